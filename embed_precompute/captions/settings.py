"""What the configuration says about captions: where they are, and how a row becomes text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from embed_precompute.captions.recipes import PlainRecipe, Recipes
from embed_precompute.errors import require

Normalization = Literal["ftfy", "nfc", "whitespace"]


@dataclass(frozen=True)
class CaptionsConfig:
    """The caption table: where it is and how its rows become samples."""

    path: str
    """A parquet file, a folder of them (nested), a glob, or a URI (s3://, gs://, hf://)."""
    text_column: str = "text"
    """Column with the caption: string, or a list of strings (one sample per caption)."""
    id_column: str | None = "id"
    """Column with a unique id, string or integer; null: the row number in file order."""
    recipe: Recipes = field(default_factory=PlainRecipe)
    """How a row becomes the text that is encoded: one recipe, or a list of recipes that follow one
    another (the text of one is the caption of the next)."""
    normalize: tuple[Normalization, ...] = ()
    """Applied to the caption before the recipe, always in the order ftfy, nfc, whitespace."""
    on_bad_text: Literal["record", "fail"] = "record"
    """Null text or invalid UTF-8: record it as the sample's status. fail: end with exit 2, also for
    an empty caption, which record encodes and counts."""

    def __post_init__(self) -> None:
        require(bool(self.path), "path is empty: expected a parquet file or folder.")
        require(self.recipe != (), "recipe is an empty list: expected a recipe, or kind none.")
