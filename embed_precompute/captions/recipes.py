"""What the configuration says of captions: where they are, and how a row becomes text.

A caption is normalised, then the recipe makes the text that is encoded. A recipe is one class in
`RECIPES`: its fields are its settings, their docstrings the help.

Guarantees: a recipe is a pure function of the row; `OpenSoraRecipe` gives, character for character,
what Open-Sora v2's `TextDataset` gives for the same table read by pandas.
Costs: about a microsecond per caption. Imports no pyarrow: a training job renders captions, too.

Open-Sora's rule is written after opensora/datasets/datasets.py (TextDataset.getitem) and
opensora/datasets/utils.py (map_target_fps) of https://github.com/hpcaitech/Open-Sora, Apache-2.0.
"""

from __future__ import annotations

import functools
import importlib
import math
import re
import string
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import Annotated, Any, Literal

from embed_precompute.documents import ByKind, MismatchError, from_plain, to_plain
from embed_precompute.errors import InputError, require
from embed_precompute.samples import Status

STRING, STRINGS, INTEGER, FLOAT = "string", "list of string", "integer", "float"
BOOLEAN, DECIMAL = "boolean", "decimal"
OPENSORA_NO_FPS = 999
"""From this fps_max on, Open-Sora leaves the FPS part out."""


@dataclass(frozen=True)
class Problem:
    """Why a row, or one caption of it, has no text to encode."""

    status: Status
    error: str


@dataclass(frozen=True)
class RequiredColumn:
    """A column that a setting asks for, and the types it may have."""

    name: str
    setting: str
    types: tuple[str, ...]
    advice: str = ""
    """What else the person may do where the column is missing or has another type."""


@dataclass(frozen=True, kw_only=True)
class Recipe(ABC):
    """How a row becomes the text that is encoded."""

    kind: str
    """Which recipe; it decides which other keys there are."""

    def needs(self, where: str) -> list[RequiredColumn]:
        """The columns that `render` reads; `where` is the recipe's own dotted key."""
        return []

    def bind(
        self, where: str, types: Mapping[str, str], holds_null: Callable[[str], bool]
    ) -> Recipe:
        """This recipe for columns of these types, with everything decided that was left open.

        `holds_null` reads a whole column. Raises InputError where the types don't fit.
        """
        return self

    @functools.cached_property
    def columns(self) -> tuple[str, ...]:
        """What `render` wants of a row, in order."""
        return tuple(column.name for column in self.needs(""))

    @abstractmethod
    def render(self, caption: str, row: Sequence[Any]) -> str | Problem:
        """The text; `row` has the values of `columns`, null as None."""

    def resolved(self) -> Any:
        """A bound recipe as JSON: its part of the fingerprint. `recipe_of` reads it back."""
        return to_plain(self)

    def trainer_settings(self) -> list[str]:
        """What the trainer's dataset must be given so that its text is the encoded one."""
        return []

    def float_columns(self) -> tuple[str, ...]:
        """Columns that the trainer's table must hold as floats, even where all are whole."""
        return ()


@dataclass(frozen=True, kw_only=True)
class PlainRecipe(Recipe):
    """The caption as it is."""

    kind: Literal["none"] = "none"

    def render(self, caption: str, row: Sequence[Any]) -> str | Problem:
        return caption


@dataclass(frozen=True, kw_only=True)
class TemplateRecipe(Recipe):
    """A format string over the caption and other columns; a null in one of them is `null_text`."""

    kind: Literal["template"] = "template"
    template: str = "{text}"
    """Text with {text} (the caption) and {column} (any other column)."""

    def __post_init__(self) -> None:
        require("text" in self._names, f"template {self.template!r} does not use {{text}}.")

    @functools.cached_property
    def _names(self) -> tuple[str, ...]:
        """Names in the template, in order of first use; `text` stands for the caption itself."""
        try:
            parts = list(string.Formatter().parse(self.template))
        except ValueError as error:
            raise InputError(
                f"template {self.template!r} is not a format string: {error}."
            ) from None
        names: dict[str, None] = {}
        for _, name, spec, conversion in parts:
            if name is None:
                continue
            plain = re.fullmatch(r"[^.\[\]{}!:]+", name) is not None
            require(
                plain and conversion is None and "{" not in (spec or ""),
                f"template holds {{{name}}}: expected plain column names such as {{text}} or "
                "{fps}, with at most a format such as {fps:.1f}.",
            )
            names[name] = None
        return tuple(names)

    def needs(self, where: str) -> list[RequiredColumn]:
        scalars = (STRING, INTEGER, FLOAT, BOOLEAN, DECIMAL)
        advice = " {text} always stands for the caption."
        return [
            RequiredColumn(name, f"{where}.template", scalars, advice)
            for name in self._names
            if name != "text"
        ]

    def bind(
        self, where: str, types: Mapping[str, str], holds_null: Callable[[str], bool]
    ) -> Recipe:
        # A format that no value of the column's type fits would spoil every row: refuse it now.
        probes = {STRING: "x", INTEGER: 1, FLOAT: 1.5, BOOLEAN: True, DECIMAL: Decimal("1.5")}
        fields = {name: probes[types[name]] for name in self.columns}
        try:
            self.template.format_map({"text": "x", **fields})
        except (ValueError, TypeError, IndexError, KeyError) as error:
            shown = ", ".join(f"{name}: {types[name]}" for name in self.columns)
            raise InputError(
                f"{where}.template {self.template!r} does not fit its columns ({shown}): {error}. "
                "Change the format or convert the column."
            ) from error
        return self

    def render(self, caption: str, row: Sequence[Any]) -> str | Problem:
        fields = {"text": caption}
        for name, value in zip(self.columns, row, strict=True):
            if value is None or value != value:  # NaN: a null of pandas
                return Problem(Status.NULL_TEXT, f"column {name!r} is null")
            if isinstance(value, Problem):
                return value
            fields[name] = value
        try:
            return self.template.format_map(fields)
        except (ValueError, TypeError, OverflowError) as error:
            return Problem(Status.INVALID_TEXT, f"the template cannot be applied: {error}")


@dataclass(frozen=True, kw_only=True)
class OpenSoraRecipe(Recipe):
    """Open-Sora v2's own: ` {fps} FPS, {n} motion score.` after the caption; null leaves a part
    out."""

    kind: Literal["opensora"] = "opensora"
    fps_column: str | None = "fps"
    """The clip's frames per second; null leaves the FPS part out."""
    fps_max: int | None = 16
    """The trainer's fps_max. A rate above it is divided by the least whole number that brings it to
    fps_max or below, and rounded down (24: 25 becomes 12, 60 becomes 20); null, or 999 and more,
    leaves the FPS part out."""
    fps_format: Literal["auto", "int", "float"] = "auto"
    """`15 FPS` or `15.0 FPS`, of a rate below fps_max; any other is
    written whole. auto: as pandas reads the column, where an integer one with a null
    anywhere is a float one."""
    motion_column: str | None = None
    """The motion score (score_vmafmotion where the trainer sets vmaf=True); null leaves it out."""

    def __post_init__(self) -> None:
        require(
            self.fps_max is None or self.fps_max > 0,
            f"fps_max is {self.fps_max}: expected 1 or more, or null.",
        )

    @functools.cached_property
    def _fps_column(self) -> str | None:
        """The column that makes the FPS part; None where Open-Sora writes no such part."""
        has_part = self.fps_max is not None and self.fps_max < OPENSORA_NO_FPS
        return self.fps_column if has_part else None

    def needs(self, where: str) -> list[RequiredColumn]:
        parts = (
            (self._fps_column, "fps_column", "the FPS part"),
            (self.motion_column, "motion_column", "the motion score"),
        )
        return [
            RequiredColumn(name, f"{where}.{key}", (INTEGER, FLOAT), f" Null leaves {part} out.")
            for name, key, part in parts
            if name is not None
        ]

    def bind(
        self, where: str, types: Mapping[str, str], holds_null: Callable[[str], bool]
    ) -> Recipe:
        column = self._fps_column
        if column is None:
            return replace(self, fps_column=None, fps_max=None, fps_format="auto")
        if self.fps_format != "auto":
            return self
        is_whole = types[column] == INTEGER and not holds_null(column)
        return replace(self, fps_format="int" if is_whole else "float")

    def render(self, caption: str, row: Sequence[Any]) -> str | Problem:
        for name, value in zip(self.columns, row, strict=True):
            if value is not None and math.isinf(value):
                return Problem(Status.INVALID_TEXT, f"column {name!r} is {value}")
        parts = []
        fps = row[0] if self._fps_column is not None else None
        if fps is not None and not math.isnan(fps):
            exact = float(fps) if self.fps_format == "float" else fps
            shown = target_fps(exact, self.fps_max or OPENSORA_NO_FPS)
            if shown != 0:
                parts.append(f"{shown} FPS")
        motion = row[-1] if self.motion_column is not None else None
        if motion is not None and not math.isnan(motion):
            parts.append(f"{int(motion + 0.5)} motion score")
        return f"{caption} {', '.join(parts)}." if parts else caption

    def trainer_settings(self) -> list[str]:
        return [f"fps_max={self.fps_max}", f"vmaf={self.motion_column is not None}"]

    def float_columns(self) -> tuple[str, ...]:
        column = self._fps_column
        return (column,) if column is not None and self.fps_format == "float" else ()


def target_fps(fps: float, fps_max: int) -> float:
    """Frames per second after taking every n-th frame, n the least that brings it to fps_max."""
    if fps < fps_max:
        return fps
    return math.floor(fps / math.ceil(fps / fps_max))


RECIPES: dict[str, type[Recipe]] = {
    "none": PlainRecipe,
    "template": TemplateRecipe,
    "opensora": OpenSoraRecipe,
}
"""By `captions.recipe.kind`."""
AnyRecipe = Annotated[Recipe, ByKind(lambda: RECIPES)]
Recipes = AnyRecipe | tuple[AnyRecipe, ...]
"""One recipe, or several: the text of one is the caption of the next."""


@dataclass(frozen=True, kw_only=True)
class RecipeChain(Recipe):
    """Recipes that follow one another."""

    kind: Literal["chain"] = "chain"
    recipes: tuple[Recipe, ...] = ()

    def _numbered(self, where: str) -> Iterator[tuple[str, Recipe]]:
        return ((f"{where}[{i}]", recipe) for i, recipe in enumerate(self.recipes))

    def needs(self, where: str) -> list[RequiredColumn]:
        return [column for key, recipe in self._numbered(where) for column in recipe.needs(key)]

    def bind(
        self, where: str, types: Mapping[str, str], holds_null: Callable[[str], bool]
    ) -> Recipe:
        bound = (recipe.bind(key, types, holds_null) for key, recipe in self._numbered(where))
        return replace(self, recipes=tuple(bound))

    def render(self, caption: str, row: Sequence[Any]) -> str | Problem:
        start = 0
        for recipe in self.recipes:
            stop = start + len(recipe.columns)
            text = recipe.render(caption, row[start:stop])
            if isinstance(text, Problem):
                return text
            caption, start = text, stop
        return caption

    def resolved(self) -> Any:
        return [recipe.resolved() for recipe in self.recipes]

    def trainer_settings(self) -> list[str]:
        return [line for recipe in self.recipes for line in recipe.trainer_settings()]

    def float_columns(self) -> tuple[str, ...]:
        return tuple(name for recipe in self.recipes for name in recipe.float_columns())


def as_one(recipes: Recipe | tuple[Recipe, ...]) -> Recipe:
    """What `captions.recipe` holds, as one recipe."""
    return recipes if isinstance(recipes, Recipe) else RecipeChain(recipes=recipes)


def recipe_of(resolved: Any) -> Recipe:
    """The recipe that a plan's spec has; InputError where it is none that this version knows."""
    try:
        return as_one(from_plain(Recipes, resolved, "spec.captions.recipe"))
    except MismatchError as error:
        raise InputError(f"the dataset's {error} Use the release that made it.") from error


Normalization = Literal["ftfy", "nfc", "whitespace"]


@dataclass(frozen=True)
class CaptionsConfig:
    """The caption table: where it is and how its rows become samples."""

    path: str
    """A file, a folder of them (nested), a glob, or a URI (s3://, gs://, hf://). Parquet, CSV, TSV
    or JSON Lines, by the ending."""
    text_column: str | tuple[str, ...] = "text"
    """Column with the caption: string, or a list of strings (one sample per caption). Several
    columns, [short, long]: of a row with the id x they make the samples x#short and x#long."""
    id_column: str | None = "auto"
    """Column with a unique id, string or integer. auto: id, or else sample_id, or else path; null:
    the row number in file order."""
    recipe: Recipes = field(default_factory=PlainRecipe)
    """How a row becomes the text that is encoded: one recipe, or a list of recipes that follow one
    another (the text of one is the caption of the next)."""
    normalize: tuple[Normalization, ...] = ()
    """Applied to the caption before the recipe, always in the order ftfy, nfc, whitespace."""
    on_bad_text: Literal["record", "fail"] = "record"
    """Null text or invalid UTF-8: record it as the sample's status. fail: end with exit 2, also for
    an empty caption, which record encodes and counts."""

    def __post_init__(self) -> None:
        require(bool(self.path), "path is empty: expected a file or folder.")
        if isinstance(self.text_column, tuple):
            names = self.text_column
            require(
                len(names) > 0 and len(set(names)) == len(names) and "#" not in "".join(names),
                f"text_column is {list(names)}: expected different columns, without # in a name.",
            )
        require(self.recipe != (), "recipe is an empty list: expected a recipe, or kind none.")

    @property
    def text_columns(self) -> tuple[str, ...]:
        """`text_column`, or each of several."""
        return (self.text_column,) if isinstance(self.text_column, str) else self.text_column


def make_normalizer(names: Sequence[str]) -> Callable[[str], str] | None:
    """`captions.normalize` as one function, in the order ftfy, nfc, whitespace; None if empty."""
    changes: list[Callable[[str], str]] = []
    if "ftfy" in names:
        try:
            changes.append(importlib.import_module("ftfy").fix_text)
        except ImportError:
            raise InputError(
                "captions.normalize asks for ftfy, which is not installed. Run `pip install "
                "'embed-precompute[text]'`, or remove ftfy from captions.normalize."
            ) from None
    if "nfc" in names:
        changes.append(functools.partial(unicodedata.normalize, "NFC"))
    if "whitespace" in names:
        changes.append(lambda text: " ".join(text.split()))
    if not changes:
        return None
    return lambda text: functools.reduce(lambda changed, change: change(changed), changes, text)
