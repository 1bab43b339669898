"""Typed documents: what a dataclass declares is accepted, everything else is named."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import pytest

from embed_precompute.documents import (
    ByKind,
    Count,
    Hex64,
    MismatchError,
    canonical_json,
    differing_fields,
    digest_of,
    from_plain,
    to_plain,
)
from embed_precompute.errors import InputError


@dataclass(frozen=True)
class File:
    name: str
    bytes: Count
    sha256: Hex64


@dataclass(frozen=True)
class Shape:
    kind: str = "shape"


@dataclass(frozen=True)
class Square(Shape):
    kind: Literal["square"] = "square"
    side: float = 1.0


@dataclass(frozen=True)
class Circle(Shape):
    kind: Literal["circle"] = "circle"
    radius: float | None = None

    def __post_init__(self) -> None:
        if self.radius == 0:
            raise InputError("radius is 0: expected more.")
        if self.radius == 1:
            raise InputError("a circle is not so small.")


SHAPES: dict[str, type] = {"square": Square, "circle": Circle}
AnyShape = Annotated[Shape, ByKind(lambda: SHAPES)]


@dataclass(frozen=True)
class Document:
    file: File
    mode: Literal["auto"] | bool = "auto"
    sizes: tuple[int, ...] = ()
    pair: tuple[int, int] = (0, 0)
    by_name: dict[str, Count] = field(default_factory=dict)
    by_number: dict[int, list[float]] = field(default_factory=dict)
    shapes: dict[str, AnyShape] = field(default_factory=dict)
    one_or_more: AnyShape | tuple[AnyShape, ...] = ()


FILE = {"name": "a", "bytes": 3, "sha256": "0" * 64}


def test_there_and_back() -> None:
    document = Document(
        File("a", 3, "0" * 64),
        mode=True,
        sizes=(1, 2),
        pair=(3, 4),
        by_name={"x": 1},
        by_number={5: [0.5]},
        shapes={"s": Square(side=2.0), "c": Circle()},
    )
    plain = to_plain(document)
    assert plain["sizes"] == [1, 2]
    assert plain["shapes"]["s"] == {"kind": "square", "side": 2.0}
    assert from_plain(Document, plain) == document
    assert from_plain(Document, {"file": FILE}) == Document(File("a", 3, "0" * 64))
    assert from_plain(AnyShape, {"kind": "square", "side": 2}) == Square(side=2.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"fle": FILE}, "there is no key fle: did you mean file?"),
        ({"file": {**FILE, "bytes": -1}}, "file.bytes is -1: expected a whole number of at least"),
        ({"file": {**FILE, "bytes": True}}, "file.bytes is true: expected a whole number"),
        ({"file": {**FILE, "bytes": 1.0}}, "file.bytes is 1.0: expected"),
        ({"file": {**FILE, "sha256": "ab"}}, "file.sha256 is 'ab': expected text of the form"),
        ({"file": {**FILE, "nme": "x"}}, "there is no key file.nme: did you mean name?"),
        ({"file": {"name": "a", "bytes": 3}}, "file.sha256 is missing"),
        ({"file": "a"}, "file is 'a': expected a mapping"),
        ({"mode": "yes"}, "mode is 'yes': expected auto or true or false"),
        ({"sizes": [1, "b"]}, "sizes[1] is 'b': expected a whole number"),
        ({"sizes": 4}, "sizes is 4: expected a list"),
        ({"pair": [1]}, "pair is [1]: expected a list of 2"),
        ({"by_name": {"x": "y"}}, "by_name.x is 'y'"),
        ({"shapes": {"s": {"kind": "sqare"}}}, "shapes.s.kind is 'sqare': did you mean square?"),
        ({"shapes": {"s": {"side": 1}}}, "shapes.s.kind is missing: expected square or circle."),
        ({"shapes": {"c": {"kind": "circle", "side": 1}}}, "there is no key shapes.c.side"),
        ({"shapes": {"c": 3}}, "shapes.c is 3: expected a mapping with the key kind"),
        ({"shapes": {"c": {"kind": []}}}, "shapes.c.kind is []: expected square or circle."),
        ({"shapes": {"c": {"kind": "circle", "radius": 0}}}, "shapes.c.radius is 0: expected more"),
        ({"shapes": {"c": {"kind": "circle", "radius": 1}}}, "shapes.c: a circle is not so small"),
        ({"one_or_more": {"kind": "circle", "side": 1}}, "there is no key one_or_more.side"),
        ({"one_or_more": [{"kind": "square", "sid": 1}]}, "there is no key one_or_more[0].sid"),
        ({"one_or_more": 3}, "one_or_more is 3: expected a mapping with a kind or a list, each"),
    ],
)
def test_what_is_wrong_is_named(change: dict[str, Any], message: str) -> None:
    with pytest.raises(MismatchError) as caught:
        from_plain(Document, {"file": FILE, **change})
    assert message in str(caught.value)
    assert caught.value.key
    assert caught.value.key in message


def test_equal_values_have_equal_bytes() -> None:
    assert canonical_json({"b": [1, "\u00e9"], "a": None}) == '{"a":null,"b":[1,"é"]}'.encode()
    assert digest_of({"a": 1, "b": 2}) == digest_of({"b": 2, "a": 1})
    with pytest.raises(ValueError, match="Out of range"):
        canonical_json(float("nan"))


def test_differing_fields() -> None:
    stored, wanted = {"a": {"b": 1, "c": 2}, "d": []}, {"a": {"b": 1, "c": 3}, "e": 4}
    assert differing_fields(stored, wanted) == ["a.c: 2 -> 3", "d: [] -> absent", "e: absent -> 4"]
