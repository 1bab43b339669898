"""F5, F6, F10: flipped bits, cut, swapped, foreign and missing files, torn small files."""

from __future__ import annotations

import re
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from breaking import flips, swap
from faults.lab import Lab, assert_same
from handmade import paths_of, write_dataset, write_units
from jobs import dataset_bytes

from embed_precompute.audit.repair import repair
from embed_precompute.audit.verify import verify
from embed_precompute.errors import VerificationError
from embed_precompute.store.check import check_digest, check_shard
from embed_precompute.store.manifest import finalize
from embed_precompute.store.records import read_json, read_record, record_path

FEW = ["one", "two words", None, "three more words", "one", "nan", "last of all"]
SMALL = ["plan.json", "null.json", "manifest.json", "shards/000/shard-000001.json"]


@pytest.fixture
def whole(lab: Lab) -> Path:
    root = lab.new()
    write_dataset(root, FEW)
    return root


# --- F5 -------------------------------------------------------------------------------------------


def test_f5_every_flipped_bit_is_found(lab: Lab) -> None:
    """Of shard, rows part, index and manifest.parquet by their digests (in the short form, every
    7th bit); of the JSON files by their own."""
    texts = [" ".join(f"word{i}" for i in range(42)) + f" {i}" for i in range(96)]
    root = lab.new()
    manifest = write_dataset(root, texts, samples_per_shard=len(texts))
    paths, named = paths_of(root, 0), read_record(root, 0).files
    assert paths.shard.stat().st_size >= 32768
    files: dict[Path, Any] = {
        paths.shard: partial(check_shard, file=named.shard),
        paths.rows: partial(check_digest, file=named.rows),
    }
    files |= {
        root / name: partial(check_digest, file=entry)
        for name, entry in manifest.files.items()
        if name.startswith("index/") or name == "manifest.parquet"
    }
    for path, check in files.items():
        payload = path.read_bytes()
        for _ in flips(path, payload, range(0, len(payload) * 8, lab.size(7, 1))):
            with pytest.raises(VerificationError):
                check(path)
    for path in (root / "plan.json", root / "null.json", paths.record, root / "manifest.json"):
        payload = path.read_bytes()
        for _ in flips(path, payload, range(len(payload) * 8)):
            with pytest.raises(VerificationError, match=str(path)):
                read_json(path)


def test_f5_verify_names_the_file_of_a_flipped_bit(lab: Lab, whole: Path) -> None:
    for path in [path for path in whole.rglob("*") if path.is_file()]:
        payload = path.read_bytes()
        bits = lab.rng.sample(range(len(payload) * 8), lab.size(4, min(400, len(payload))))
        for _ in flips(path, payload, [0, *bits, len(payload) * 8 - 1]):
            assert any(path.name in line for line in verify(whole).problems)
    for _ in range(lab.size(10, 1000)):
        assert verify(whole).problems == []


# --- F6 -------------------------------------------------------------------------------------------


def test_f6_damage_is_named_and_only_its_unit_made_again(lab: Lab, whole: Path) -> None:
    expected = dataset_bytes(whole)
    other = lab.new()
    write_dataset(other, ["uno", *FEW[1:]])
    for what, named, damage in damages(whole, other, lab):
        root = lab.copy(whole)
        damage(root)
        found = verify(root).problems
        unit = named[:12] if named.startswith("shard-") else named.partition(".")[0]
        if (what, named) != ("delete", "manifest.json"):  # then it is not finalised
            assert any(unit in line for line in found), (what, named, found)
        assert_mends(root, expected, named)
        shutil.rmtree(root)


def assert_mends(root: Path, expected: dict[str, bytes], named: str) -> None:
    """Repair opens the unit of the file `named` only, and the job ends with the same bytes."""
    unit = int(named[6:12]) if named.startswith("shard-") else None
    if unit is not None and not record_path(root, unit).exists():
        unit = None  # it is open already
    opened = repair(root).opened
    assert unit is None or unit in opened
    assert len(opened) <= 2
    assert unit is not None or not opened or named == "plan.json"
    write_units(root, FEW)  # units that have a record stay
    finalize(root)
    assert_same(dataset_bytes(root), expected)


Damage = tuple[str, str, Callable[[Path], object]]


def damages(whole: Path, other: Path, lab: Lab) -> Iterator[Damage]:
    """(what, the damaged file's name, a function that does it to a copy of the dataset)."""
    for path in [path for path in sorted(whole.rglob("*")) if path.is_file()]:
        name, payload = path.relative_to(whole), path.read_bytes()
        written = [("append", payload + b"\0")]
        for end in lab.sample(range(0, len(payload), 512), 1):
            written.append(("cut", payload[:end]))
        for begin in lab.sample(range(0, len(payload), 4096), 1):
            head, page, tail = payload[:begin], payload[begin:][:4096], payload[begin + 4096 :]
            written.append(("zero", head + bytes(len(page)) + tail))
        # The other dataset's file in the same place; data files have other names there.
        for foreign in other.glob(re.sub(r"-[0-9a-f]{16}\.", "-*.", str(name))):
            written.append(("foreign", foreign.read_bytes()))
        for what, hurt in written:
            if hurt != payload:
                yield what, path.name, lambda r, n=name, h=hurt: (r / n).write_bytes(h)
        yield "delete", path.name, lambda r, n=name: (r / n).unlink()
    for one, two in zip(paths_of(whole, 0), paths_of(whole, 1), strict=True):
        names = one.relative_to(whole), two.relative_to(whole)
        yield "swap", one.name, lambda r, n=names: swap(r / n[0], r / n[1])


# --- F10 ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SMALL)
def test_f10_torn_at_every_byte(name: str, lab: Lab, whole: Path) -> None:
    """Plan, null record, root and a record; some of the cuts are mended."""
    path, expected = whole / name, dataset_bytes(whole)
    payload = expected[name]
    for end in range(len(payload)):
        path.write_bytes(payload[:end])
        with pytest.raises(VerificationError, match=str(path)):
            read_json(path)
    path.write_bytes(payload)
    for end in lab.rng.sample(range(len(payload)), lab.size(3, 60)):
        root = lab.copy(whole)
        (root / name).write_bytes(payload[:end])
        assert_mends(root, expected, path.name)
