"""From a caption and the other columns of its row to the text that is encoded.

Guarantees: a recipe is a pure function of the row; `OpenSoraRecipe` gives, character for character,
what Open-Sora v2's `TextDataset` gives for the same table read by pandas.
Costs: about a microsecond per caption; `kind: none` without normalisation costs nothing.

Open-Sora's rule was written anew from opensora/datasets/datasets.py (TextDataset.getitem) and
opensora/datasets/utils.py (map_target_fps) of https://github.com/hpcaitech/Open-Sora, Apache-2.0.
"""

from __future__ import annotations

import importlib
import math
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Literal, Protocol

from embed_precompute.captions.columns import (
    BOOLEAN,
    DECIMAL,
    FLOAT,
    INTEGER,
    STRING,
    Need,
    Problem,
)
from embed_precompute.captions.settings import RecipeConfig
from embed_precompute.errors import InputError
from embed_precompute.samples import Status

OPENSORA_NO_FPS = 999
"""From this fps_max on, Open-Sora leaves the FPS part out."""


class Recipe(Protocol):
    """`columns` are what `render` wants of a row, in order, beside the caption."""

    @property
    def columns(self) -> tuple[str, ...]: ...

    def render(self, caption: str, row: Sequence[Any]) -> str | Problem: ...

    def resolved(self) -> dict[str, object]: ...

    def trainer_settings(self) -> list[str]:
        """What the trainer's dataset must be given so that its text is the encoded one."""
        ...

    def float_columns(self) -> tuple[str, ...]:
        """Columns that the trainer's table must hold as floats, whatever rows it has."""
        ...


def recipe_of(resolved: Mapping[str, Any]) -> Recipe:
    """The recipe that a plan's spec has."""
    if resolved["kind"] == "none":
        return PlainRecipe()
    if resolved["kind"] == "template":
        names = RecipeConfig("template", resolved["template"]).template_columns()
        return TemplateRecipe(resolved["template"], tuple(name for name in names if name != "text"))
    if resolved["kind"] == "opensora":
        return OpenSoraRecipe(
            resolved["fps_column"],
            resolved["fps_max"] or OPENSORA_NO_FPS,
            resolved["fps_format"] or "int",
            resolved["motion_column"],
        )
    raise InputError(f"the dataset has recipe {resolved['kind']!r}, which this version lacks.")


@dataclass(frozen=True)
class PlainRecipe:
    """The caption as it is."""

    @property
    def columns(self) -> tuple[str, ...]:
        return ()

    def render(self, caption: str, row: Sequence[Any]) -> str | Problem:
        return caption

    def resolved(self) -> dict[str, object]:
        return {"kind": "none"}

    def trainer_settings(self) -> list[str]:
        return []

    def float_columns(self) -> tuple[str, ...]:
        return ()


@dataclass(frozen=True)
class TemplateRecipe:
    """A format string over the caption ({text}) and other columns."""

    template: str
    columns: tuple[str, ...]

    def render(self, caption: str, row: Sequence[Any]) -> str | Problem:
        fields = {"text": caption}
        for name, value in zip(self.columns, row, strict=True):
            if value is None:
                return Problem(Status.NULL_TEXT, f"column {name!r} is null")
            if isinstance(value, Problem):
                return value
            fields[name] = value
        try:
            return self.template.format_map(fields)
        except (ValueError, TypeError, OverflowError) as error:
            return Problem(Status.INVALID_TEXT, f"the template cannot be applied: {error}")

    def resolved(self) -> dict[str, object]:
        return {"kind": "template", "template": self.template}

    def trainer_settings(self) -> list[str]:
        return []

    def float_columns(self) -> tuple[str, ...]:
        return ()


@dataclass(frozen=True)
class OpenSoraRecipe:
    """` {fps} FPS, {n} motion score.` behind the caption; a part is left out where unknown."""

    fps_column: str | None
    """None where the FPS part is off, be it by the column or by fps_max."""
    fps_max: int
    fps_format: Literal["int", "float"]
    """How pandas holds the column: an integer one with a null anywhere becomes float64."""
    motion_column: str | None

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(name for name in (self.fps_column, self.motion_column) if name is not None)

    def render(self, caption: str, row: Sequence[Any]) -> str | Problem:
        parts = []
        for name, value in zip(self.columns, row, strict=True):
            if value is not None and math.isinf(value):
                return Problem(Status.INVALID_TEXT, f"column {name!r} is {value}")
        fps = row[0] if self.fps_column is not None else None
        if fps is not None and not math.isnan(fps):
            shown = target_fps(float(fps) if self.fps_format == "float" else fps, self.fps_max)
            if shown != 0:
                parts.append(f"{shown} FPS")
        motion = row[-1] if self.motion_column is not None else None
        if motion is not None and not math.isnan(motion):
            parts.append(f"{int(motion + 0.5)} motion score")
        return f"{caption} {', '.join(parts)}." if parts else caption

    def resolved(self) -> dict[str, object]:
        fps = self.fps_column is not None
        return {
            "kind": "opensora",
            "fps_column": self.fps_column,
            "fps_max": self.fps_max if fps else None,
            "fps_format": self.fps_format if fps else None,
            "motion_column": self.motion_column,
        }

    def trainer_settings(self) -> list[str]:
        fps_max = None if self.fps_column is None else self.fps_max
        return [f"fps_max={fps_max}", f"vmaf={self.motion_column is not None}"]

    def float_columns(self) -> tuple[str, ...]:
        is_float = self.fps_column is not None and self.fps_format == "float"
        return (str(self.fps_column),) if is_float else ()


def target_fps(fps: float, fps_max: int) -> float:
    """Frames per second after taking every n-th frame, n the least that brings it to fps_max."""
    if fps < fps_max:
        return fps
    return math.floor(fps / math.ceil(fps / fps_max))


def opensora_fps_column(config: RecipeConfig) -> str | None:
    """The column that makes the FPS part; None where Open-Sora writes no such part."""
    if config.kind != "opensora" or config.fps_max is None or config.fps_max >= OPENSORA_NO_FPS:
        return None
    return config.fps_column


def recipe_needs(config: RecipeConfig) -> list[Need]:
    """Columns the recipe reads, and the types it can use."""
    if config.kind == "template":
        scalars = (STRING, INTEGER, FLOAT, BOOLEAN, DECIMAL)
        names = [name for name in config.template_columns() if name != "text"]
        hint = " {text} always stands for the caption."
        return [Need(name, "captions.recipe.template", scalars, hint) for name in names]
    if config.kind == "none":
        return []
    parts = (
        (opensora_fps_column(config), "captions.recipe.fps_column", "the FPS part"),
        (config.motion_column, "captions.recipe.motion_column", "the motion score"),
    )
    return [
        Need(name, setting, (INTEGER, FLOAT), f" Null leaves {part} out.")
        for name, setting, part in parts
        if name is not None
    ]


def make_recipe(config: RecipeConfig, families: Mapping[str, str], has_nulls: bool) -> Recipe:
    """The recipe for columns of these families; `has_nulls`: the FPS column holds a null."""
    if config.kind == "none":
        return PlainRecipe()
    if config.kind == "template":
        names = tuple(name for name in config.template_columns() if name != "text")
        template = TemplateRecipe(config.template, names)
        _check_template(template, families)
        return template
    fps_column = opensora_fps_column(config)
    whole = fps_column is not None and families[fps_column] == INTEGER and not has_nulls
    return OpenSoraRecipe(
        fps_column=fps_column,
        fps_max=config.fps_max or OPENSORA_NO_FPS,
        fps_format="int" if whole else "float",
        motion_column=config.motion_column,
    )


def _check_template(recipe: TemplateRecipe, families: Mapping[str, str]) -> None:
    """A format that no value of the column's type fits would spoil every row: refuse it now."""
    probes = {STRING: "x", INTEGER: 1, FLOAT: 1.5, BOOLEAN: True, DECIMAL: Decimal("1.5")}
    fields = {name: probes[families[name]] for name in recipe.columns}
    try:
        recipe.template.format_map({"text": "x", **fields})
    except (ValueError, TypeError, IndexError, KeyError) as error:
        types = ", ".join(f"{name}: {families[name]}" for name in recipe.columns)
        raise InputError(
            f"captions.recipe.template {recipe.template!r} does not fit its columns ({types}): "
            f"{error}. Mend the format or convert the column."
        ) from error


def make_normalizer(steps: Sequence[str]) -> Callable[[str], str] | None:
    """The steps as one function, always in the order ftfy, nfc, whitespace; None for no step."""
    chosen = [_STEPS[name]() for name in _STEPS if name in steps]
    if not chosen:
        return None

    def normalize(text: str) -> str:
        for step in chosen:
            text = step(text)
        return text

    return normalize


def _ftfy() -> Callable[[str], str]:
    try:
        fix_text: Callable[[str], str] = importlib.import_module("ftfy").fix_text
    except ImportError:
        raise InputError(
            "captions.normalize asks for ftfy, which is not installed. Run `pip install ftfy`, or "
            "take ftfy out of captions.normalize."
        ) from None
    return fix_text


def _nfc() -> Callable[[str], str]:
    return lambda text: unicodedata.normalize("NFC", text)


def _whitespace() -> Callable[[str], str]:
    return lambda text: " ".join(text.split())


_STEPS: dict[str, Callable[[], Callable[[str], str]]] = {
    "ftfy": _ftfy,
    "nfc": _nfc,
    "whitespace": _whitespace,
}
