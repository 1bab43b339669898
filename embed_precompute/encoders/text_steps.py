"""What one encoder does with a text before its template and its tokenizer: cleaning, in steps.

Guarantees: the steps are pure functions. With them a text becomes what the pipelines of these
models make of it, character for character; docs/texts.md names the steps of each.
Costs: `ftfy` takes some ten microseconds of a caption, `clean_caption` about half a millisecond.

Follows, at diffusers 0.42.1 (Apache-2.0): `_clean_caption` of pixart_alpha/pipeline_pixart_alpha.py
and `extract_glyph_texts` of hunyuan_video1_5/pipeline_hunyuan_video1_5.py.
"""

from __future__ import annotations

import functools
import html
import importlib
import importlib.metadata
import platform
import re
import urllib.parse
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Literal

from embed_precompute.errors import InputError

Step = Literal["ftfy", "html_unescape", "strip", "whitespace", "lower", "clean_caption", "quoted"]
Empty = Literal["encode", "space", "nothing"]
PACKAGES = {
    "ftfy": {"ftfy": "ftfy"},
    "clean_caption": {"ftfy": "ftfy", "bs4": "beautifulsoup4"},
}
"""Step -> the modules that it imports, and the packages that they come from."""

FILES = "png|jpg|jpeg|bmp|webp|eps|pdf|apk|mp4"
_HOST = r"[a-zA-Z0-9.\-]+[.](?:com|co|ru|net|org|edu|gov|it)[\w/-]*\b/?(?!@)"
BEFORE_MARKUP = (
    ("<person>", "person"),
    (rf"\b(?:https?:(?:/{{1,3}}|[a-zA-Z0-9%])|{_HOST})", ""),
    (rf"\b(?:www:(?:/{{1,3}}|[a-zA-Z0-9%])|{_HOST})", ""),
)
"""(pattern, replacement), in this order: addresses of pages."""
AFTER_MARKUP = (
    (r"@[\w\d]+\b", ""),  # names of users
    # CJK strokes, phonetic extensions, enclosed letters, compatibility, ideographs, hexagrams
    (r"[\u31c0-\u31ef\u31f0-\u31ff\u3200-\u4dbf\u4dc0-\u4dff\u4e00-\u9fff]", ""),
    (
        r"[\u002D\u058A\u05BE\u1400\u1806\u2010-\u2015\u2E17\u2E1A\u2E3A\u2E3B\u2E40\u301C\u3030"
        r"\u30A0\uFE31\uFE32\uFE58\uFE63\uFF0D]+",
        "-",
    ),
    (r"[`´«»“”¨]", '"'),
    (r"[‘’]", "'"),
    (r"&quot;?", ""),
    (r"&amp", ""),
    (r"\d{1,3}\.\d{1,3}\.\d{1,3}\.\d{1,3}", " "),  # addresses of computers
    (r"\d:\d\d\s+$", ""),
    (r"\\n", " "),  # a backslash and an n
    (r"#\d{1,3}\b", ""),
    (r"#\d{5,}\b", ""),
    (r"\b\d{6,}\b", ""),
    (rf"[\S]+\.(?:{FILES})", ""),
    (r"[\"']{2,}", '"'),
    (r"[.]{2,}", " "),
    (r"[#®•©™&@·º½¾¿¡§~)(\]\[}{|\\/*]+", " "),
    (r"\s+\.\s+", " "),
)
"""What follows once tags are removed."""
MANY_JOINTS = 3
"""With more hyphens and underscores than this a text is words that were joined by them."""
AFTER_FTFY = (
    (r"\b[a-zA-Z]{1,3}\d{3,15}\b", ""),  # numbers of articles
    (r"\b[a-zA-Z]+\d+[a-zA-Z]+\b", ""),
    (r"\b\d+[a-zA-Z]+\d+\b", ""),
    (r"(worldwide\s+)?(free\s+)?shipping", ""),
    (r"(free\s)?download(\sfree)?", ""),
    (r"\bclick\b\s(?:for|on)\s\w+", ""),
    (rf"\b(?:{FILES})(\simage[s]?)?", ""),
    (r"\bpage\s+\d+\b", ""),
    (r"\b\d*[a-zA-Z]+\d+[a-zA-Z]+\d+[a-zA-Z\d]*\b", " "),
    (r"\b\d+\.?\d*[xх×]\d+\.?\d*\b", ""),  # sizes; the second x is Cyrillic
    (r"\b\s+\:\s+", ": "),
    (r"(\D[,\./])\b", r"\1 "),
    (r"\s+", " "),
    # The source strips here and drops the result: the ends still have their white space.
    (r"^[\"']([\w\W]+)[\"']$", r"\1"),
    (r"^['_,\-:;]", ""),
    (r"['_,\-:+]$", ""),
    (r"^\.\S+$", ""),
)
QUOTED = re.compile(r"\"(.*?)\"|“(.*?)”")


def require_packages(where: str, steps: Sequence[Step]) -> None:
    """InputError, which `where` begins, unless all packages are there that the steps need."""
    for step in steps:
        for module, package in PACKAGES.get(step, {}).items():
            try:
                importlib.import_module(module)
            except ImportError:
                raise InputError(
                    f"{where}.text_steps asks for {step}, which needs {package}, and it is not "
                    "installed. Run `pip install 'embed-precompute[text]'`."
                ) from None


def make_cleaner(steps: Sequence[Step]) -> Callable[[str], str]:
    """All steps as one function."""
    made = [_maker(step) for step in steps]
    return lambda text: functools.reduce(lambda changed, step: step(changed), made, text)


def versions(steps: Sequence[Step]) -> dict[str, str]:
    """The releases that what the steps give may depend on, for the environment."""
    packages = {package for step in steps for package in PACKAGES.get(step, {}).values()}
    found = {package: importlib.metadata.version(package) for package in sorted(packages)}
    if {"clean_caption", "html_unescape"} & set(steps):  # Python's own reader of HTML
        found["python"] = platform.python_version()
    return found


def _maker(step: Step) -> Callable[[str], str]:
    if step == "clean_caption":
        bs4, ftfy = importlib.import_module("bs4"), importlib.import_module("ftfy")
        # A caption is no file name and no address, whatever it looks like.
        warnings.filterwarnings("ignore", category=bs4.MarkupResemblesLocatorWarning)
        return functools.partial(_clean_caption, bs4.BeautifulSoup, ftfy.fix_text)
    if step == "ftfy":
        fix_text: Callable[[str], str] = importlib.import_module("ftfy").fix_text
        return fix_text
    plain: dict[Step, Callable[[str], str]] = {
        "html_unescape": html.unescape,
        "strip": str.strip,
        "whitespace": lambda text: re.sub(r"\s+", " ", text).strip(),
        "lower": str.lower,
        "quoted": _quoted,
    }
    return plain[step]


def _clean_caption(parse: Any, fix_text: Callable[[str], str], text: str) -> str:
    """PixArt's cleaning, once; its pipeline applies it twice."""
    text = _replaced(BEFORE_MARKUP, urllib.parse.unquote_plus(text).strip().lower())
    text = _replaced(AFTER_MARKUP, parse(text, features="html.parser").text)
    if len(re.findall(r"[-_]", text)) > MANY_JOINTS:
        text = re.sub(r"[-_]", " ", text)
    text = html.unescape(html.unescape(fix_text(text)))
    return _replaced(AFTER_FTFY, text).strip()


def _replaced(rules: Sequence[tuple[str, str]], text: str) -> str:
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text)
    return text


def _quoted(text: str) -> str:
    """The quoted passages of a text, each once, as a glyph encoder's prompt; "" without any."""
    passages = dict.fromkeys(one or other for one, other in QUOTED.findall(text))
    return "".join(f'Text "{passage}". ' for passage in passages)
