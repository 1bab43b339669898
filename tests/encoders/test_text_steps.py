"""Text steps: character for character what diffusers' pipelines make of a caption."""

from __future__ import annotations

import importlib
import random
import sys
from collections.abc import Callable
from typing import Any

import pytest

from embed_precompute.encoders.text_steps import make_cleaner, require_packages, versions
from embed_precompute.errors import InputError

WAN = ("ftfy", "html_unescape", "html_unescape", "strip", "whitespace")
PIECES = (
    *(
        "https://a.b/c",
        "www:",
        "www.shop.com/x",
        " @user",
        "a@b.org",
        "&amp;",
        "&quot",
        "&amp;lt;b",
    ),
    *("&#60;", "<b>", "</p>", "<person>", "<![CDATA[", "<!-- x -->", "<a href='", "%20", "%u", "+"),
    *("\u201c", "\u201d", '"', "'", "\u2019", "''", "...", " . ", "-", "_", "\u2014", "\u301c"),
    *("#12", "#123456", "abc12", "12ab34", "j2d1a2a", "free shipping", "download free", "1:23 "),
    *("click for x", "png images", "a.png", "page 12", "3x4", "3\u04454\u00d75", " : ", ",a", "/b"),
    *("10.0.0.1", "\\n", "\n", "\t", "\u3000", "\xa0", "\x1c", "\x85", "\u200b", ".x", "^", "~|"),
    *(
        "\uff21\uff22",
        "\u4e2d\u6587",
        "\u32ff",
        "\u00e9",
        "\u00c3\u00a9",
        "\u0130",
        "\u00df",
        "Word",
    ),
    *("7", " ", " and ", "\U0001f525", "Text"),
)


@pytest.fixture(scope="module")
def texts(corpus: list[str]) -> list[str]:
    """Captions, and lines of pieces that the rules are about, side by side."""
    rng = random.Random(0)
    lines = ["".join(rng.choices(PIECES, k=rng.randrange(1, 14))) for _ in range(3000)]
    return ["", " ", *corpus[:50], *PIECES, *lines]


def function(module: str, name: str) -> Callable[[str], Any]:
    """A function of diffusers' pipelines; a release that lacks it skips the test by name."""
    import diffusers

    try:
        found: Any = getattr(importlib.import_module(f"diffusers.pipelines.{module}"), name)
    except ModuleNotFoundError:
        pytest.skip(f"diffusers {diffusers.__version__} has no {module}")
    return found  # type: ignore[no-any-return]


def test_clean_caption_is_pixarts(texts: list[str]) -> None:
    """Twice, as its pipeline applies it."""
    import bs4  # noqa: F401, without them diffusers would not clean
    import ftfy  # noqa: F401

    pixart: Any = function("pixart_alpha.pipeline_pixart_alpha", "PixArtAlphaPipeline")
    expected = pixart._text_preprocessing(pixart.__new__(pixart), texts, clean_caption=True)
    clean = make_cleaner(("clean_caption", "clean_caption"))
    assert [clean(text) for text in texts] == expected
    plain = pixart._text_preprocessing(pixart.__new__(pixart), texts, clean_caption=False)
    lower = make_cleaner(("lower", "strip"))
    assert [lower(text) for text in texts] == plain


def test_the_steps_of_wan(texts: list[str]) -> None:
    import ftfy  # noqa: F401

    prompt_clean, clean = function("wan.pipeline_wan", "prompt_clean"), make_cleaner(WAN)
    assert [clean(text) for text in texts] == [prompt_clean(text) for text in texts]


def test_quoted_is_the_glyph_text_of_hunyuan_video(texts: list[str]) -> None:
    glyphs = function("hunyuan_video1_5.pipeline_hunyuan_video1_5", "extract_glyph_texts")
    quoted = make_cleaner(("quoted",))
    found = [quoted(text) for text in texts]
    assert found == [glyphs(text) or "" for text in texts]
    assert len(set(found)) > 20
    assert quoted('A sign "OPEN", and \u201cOPEN\u201d, "24 h"') == 'Text "OPEN". Text "24 h". '


def test_the_order_is_the_users() -> None:
    assert make_cleaner(())(" A&amp;lt; ") == " A&amp;lt; "
    assert make_cleaner(("html_unescape", "lower"))(" A&amp;LT;") == " a&lt;"
    assert make_cleaner(("lower", "html_unescape", "html_unescape"))("A&amp;LT;") == "a<"
    assert make_cleaner(("whitespace",))(" a\u3000\n b\x1c") == "a b"


def test_a_package_that_is_not_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bs4", None)
    require_packages("encoders.t5", ("lower",))
    with pytest.raises(InputError, match=r"^encoders.t5.text_steps asks for clean_caption, which "):
        require_packages("encoders.t5", ("lower", "clean_caption"))


def test_versions_that_a_text_depends_on() -> None:
    assert versions(("strip", "quoted")) == {}
    assert versions(("html_unescape",)).keys() == {"python"}
    assert versions(("clean_caption",)).keys() == {"beautifulsoup4", "ftfy", "python"}
