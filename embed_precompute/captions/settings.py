"""What the configuration says about captions: where they are, and how a row becomes text."""

from __future__ import annotations

import re
import string
from dataclasses import dataclass, field
from typing import Literal

from embed_precompute.errors import InputError, require

Normalization = Literal["ftfy", "nfc", "whitespace"]


@dataclass(frozen=True)
class RecipeConfig:
    """How a row becomes the text that is encoded."""

    kind: Literal["none", "template", "opensora"] = "none"
    """none: the text column; template: a format string; opensora: Open-Sora v2's suffix."""
    template: str = "{text}"
    """template only: text with {text} (the caption) and {column} (any other column)."""
    fps_column: str | None = "fps"
    """opensora only: the clip's frames per second; null to leave the FPS part out."""
    fps_max: int | None = 16
    """opensora only: the trainer's fps_max; null, or 999 and more, leaves the FPS part out."""
    motion_column: str | None = None
    """opensora only: motion score (score_vmafmotion when the trainer sets vmaf=True), or null."""

    def __post_init__(self) -> None:
        if self.fps_max is not None:
            require(
                self.fps_max > 0, f"captions.recipe.fps_max is {self.fps_max}: expected 1 or more."
            )
        if self.kind == "template":
            self.template_columns()

    def template_columns(self) -> tuple[str, ...]:
        """Names in `template`, in order of first use; `text` stands for the caption itself."""
        where = "captions.recipe.template"
        names: list[str] = []
        try:
            parts = list(string.Formatter().parse(self.template))
        except ValueError as error:
            raise InputError(
                f"{where} {self.template!r} is not a format string: {error}."
            ) from None
        for _, name, spec, conversion in parts:
            if name is None:
                continue
            plain = re.fullmatch(r"[^.\[\]{}!:]+", name) is not None
            require(
                plain and conversion is None and "{" not in (spec or ""),
                f"{where} holds {{{name}}}: expected plain column names such as {{text}} or "
                "{fps}, with at most a format such as {fps:.1f}.",
            )
            if name not in names:
                names.append(name)
        require("text" in names, f"{where} {self.template!r} does not use {{text}}.")
        return tuple(names)


@dataclass(frozen=True)
class CaptionsConfig:
    """The caption table: where it is and how its rows become samples."""

    path: str
    """A parquet file, a folder of them (nested), a glob, or a URI pyarrow reads (s3://, gs://)."""
    text_column: str = "text"
    """Column with the caption: string, or a list of strings (one sample per caption)."""
    id_column: str | None = "id"
    """Column with a unique id, string or integer; null: the row number in file order."""
    recipe: RecipeConfig = field(default_factory=RecipeConfig)
    """How a row becomes the text that is encoded."""
    normalize: tuple[Normalization, ...] = ()
    """Applied to the caption before the recipe, always in the order ftfy, nfc, whitespace."""
    on_bad_text: Literal["record", "fail"] = "record"
    """Null text or invalid UTF-8: record it as the sample's status, or fail (exit 2)."""

    def __post_init__(self) -> None:
        require(bool(self.path), "captions.path is empty: expected a parquet file or folder.")
