"""Recipes: from a caption and the columns of its row to the text that is encoded."""

from __future__ import annotations

import math
import sys
import types
from collections.abc import Sequence
from typing import Any

import pytest

from embed_precompute.captions.recipes import (
    FLOAT,
    INTEGER,
    STRING,
    OpenSoraRecipe,
    PlainRecipe,
    Problem,
    Recipe,
    TemplateRecipe,
    as_one,
    make_normalizer,
    recipe_of,
)
from embed_precompute.documents import canonical_json
from embed_precompute.errors import InputError
from embed_precompute.samples import Status

TYPES = {"fps": FLOAT, "score": FLOAT, "place": STRING, "n": INTEGER}
OPENSORA = OpenSoraRecipe(motion_column="score")


def bound(recipe: Recipe, **types: str) -> Recipe:
    return recipe.bind("captions.recipe", {**TYPES, **types}, lambda column: False)


def rendered(recipe: Recipe, *rows: Sequence[Any]) -> list[str | Problem]:
    return [recipe.render("a", row) for row in rows]


# --- template ----------------------------------------------------------------------------------


def test_template() -> None:
    recipe = bound(TemplateRecipe(template="{text}: {fps:.1f} FPS, {place}{n} {{}} {text}."))
    assert recipe.columns == ("fps", "place", "n")
    assert recipe.render("a {dog}", (24.0, "x", 1)) == "a {dog}: 24.0 FPS, x1 {} a {dog}."
    null = recipe.render("b", (None, "y", 2))
    assert null == Problem(Status.NULL_TEXT, "column 'fps' is null")
    broken = Problem(Status.INVALID_TEXT, "column 'place' is not UTF-8")
    assert recipe.render("b", (1.0, broken, 2)) is broken
    assert rendered(TemplateRecipe(template="{text} {n}"), (24,), (24.0,)) == ["a 24", "a 24.0"]


def test_a_template_cannot_reach_beyond_columns_and_must_fit_rows() -> None:
    for template, said in (
        *((each, "plain column names") for each in ("{text.__class__}", "{text[0]}", "{text!r}")),
        ("{text:{fps}}", "plain column names"),
        ("{fps} only", "does not use"),
        ("{text", "not a format string"),
    ):
        with pytest.raises(InputError, match=f"^template .*{said}"):
            TemplateRecipe(template=template)
    for template in ("{text} {fps:d}", "{text} {0}", "{text:.2f}"):
        with pytest.raises(InputError, match=r"captions\.recipe\.template .* does not fit"):
            bound(TemplateRecipe(template=template), **{"0": STRING})


# --- Open-Sora ---------------------------------------------------------------------------------


def test_opensora_float_fps_and_missing_values() -> None:
    """More of them, against Open-Sora's own rule: tests/opensora/test_drop_in.py."""
    rows = {
        (15.0, 0.4): "a 15.0 FPS, 0 motion score.",
        (16.0, 0.5): "a 16 FPS, 1 motion score.",
        (24.0, None): "a 12 FPS.",
        (29.97, math.nan): "a 14 FPS.",
        (0.0, 3.0): "a 3 motion score.",
        (None, 2.49): "a 2 motion score.",
        (math.nan, None): "a",
        (60.0, 10.5): "a 15 FPS, 11 motion score.",
        (12.5, 1.0): "a 12.5 FPS, 1 motion score.",
        (33.0, -2.0): "a 11 FPS, -1 motion score.",  # cut towards zero, as Python's int does
    }
    assert rendered(bound(OPENSORA), *rows) == list(rows.values())


def test_opensora_limits() -> None:
    """A null in an integer column: test_captions. From 999 on, not even the column is needed."""
    explicit = bound(OpenSoraRecipe(fps_format="float"), fps=INTEGER)
    assert rendered(explicit, (15,)) == ["a 15.0 FPS."]
    for fps_max in (None, 999, 5000):
        recipe = bound(OpenSoraRecipe(fps_max=fps_max))
        assert (recipe.columns, rendered(recipe, ())) == ((), ["a"])
        assert recipe == OpenSoraRecipe(fps_column=None, fps_max=None)
        assert recipe.trainer_settings() == ["fps_max=None", "vmaf=False"]
    large = bound(OpenSoraRecipe(fps_max=998), fps=INTEGER)
    assert rendered(large, (24,), (1000,)) == ["a 24 FPS.", "a 500 FPS."]
    assert (large.float_columns(), explicit.float_columns()) == ((), ("fps",))
    assert rendered(bound(OpenSoraRecipe(fps_max=1)), (1.5,), (1.0,)) == ["a", "a 1 FPS."]
    found = rendered(bound(OPENSORA), (math.inf, 1.0), (24.0, math.inf), (-math.inf, 1.0))
    reasons = ["column 'fps' is inf", "column 'score' is inf", "column 'fps' is -inf"]
    assert found == [Problem(Status.INVALID_TEXT, reason) for reason in reasons]
    with pytest.raises(InputError, match="fps_max is 0: expected 1 or more"):
        OpenSoraRecipe(fps_max=0)


# --- several, and the registry -----------------------------------------------------------------


def test_recipes_follow_one_another() -> None:
    chain = as_one((TemplateRecipe(template="{text} at {place}"), OPENSORA))
    settings = [column.setting for column in chain.needs("captions.recipe")]
    assert settings == [
        "captions.recipe[0].template",
        "captions.recipe[1].fps_column",
        "captions.recipe[1].motion_column",
    ]
    recipe = bound(chain, fps=INTEGER)
    assert recipe.columns == ("place", "fps", "score")
    assert recipe.render("a", ("sea", 24, 1.0)) == "a at sea 12 FPS, 1 motion score."
    null = Problem(Status.NULL_TEXT, "column 'place' is null")
    assert recipe.render("a", (None, 24, 1.0)) == null
    assert recipe.trainer_settings() == ["fps_max=16", "vmaf=True"]
    assert PlainRecipe().trainer_settings() == []
    assert bound(chain).float_columns() == ("fps",)


def test_the_spec_of_the_plan() -> None:
    """A bound recipe is read back from it."""
    template, chain = TemplateRecipe(template="{text}."), as_one((OPENSORA, PlainRecipe()))
    for recipe in (PlainRecipe(), template, OPENSORA, chain):
        made = bound(recipe)
        assert recipe_of(made.resolved()) == made
        assert canonical_json(made.resolved())
    assert canonical_json(bound(OPENSORA, fps=INTEGER).resolved()) == (
        b'{"fps_column":"fps","fps_format":"int","fps_max":16,"kind":"opensora",'
        b'"motion_column":"score"}'
    )
    assert PlainRecipe().resolved() == {"kind": "none"}
    with pytest.raises(InputError, match=r"spec\.captions\.recipe\.kind is 'prefix'"):
        recipe_of({"kind": "prefix"})


# --- normalisation -----------------------------------------------------------------------------


def test_normalisation_has_one_order(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = types.ModuleType("ftfy")
    fake.fix_text = lambda text: text.replace("&amp;", "  &")  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "ftfy", fake)

    def normalized(text: str, *steps: str) -> str:
        normalize = make_normalizer(steps)
        assert normalize is not None
        return normalize(text)

    raw = "  e\u0301\u00a0 x\n"
    assert make_normalizer(()) is None
    assert normalized(raw, "nfc") == "  \u00e9\u00a0 x\n"
    assert normalized(raw, "whitespace") == "e\u0301 x"
    assert normalized(raw, "whitespace", "nfc") == "\u00e9 x"
    assert normalized("a&amp;b", "whitespace", "ftfy") == "a &b"


def test_ftfy_that_is_not_installed_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ftfy", None)
    with pytest.raises(InputError, match="normalize asks for ftfy"):
        make_normalizer(("ftfy",))
