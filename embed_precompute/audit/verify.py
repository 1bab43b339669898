"""Verify: is every stored byte what the records say, and is every input row accounted for?

Guarantees: `full` finds every changed, missing, cut or swapped file under the digests, and every
disagreement between plan, records, shards, rows parts, manifest and index; damage is a problem
line that names the file, never a crash. Nothing is written. An unfinished dataset is checked as far
as it goes.
Costs: `quick` reads the small files and the shards' headers; `full` reads every shard twice (its
sha256, then each row's checksum), one unit at a time: memory does not grow with the dataset, except
by 8 bytes per sample for the id check where there is no sound index. `deep` is `full`, then encodes
some samples again.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import re
import secrets
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from embed_precompute.audit.unit_check import (
    Level,
    Report,
    SampleTable,
    UnitCheck,
    check_rows,
    repeated_ids,
)
from embed_precompute.documents import canonical_json, digest_of, flatten
from embed_precompute.errors import InputError
from embed_precompute.store.commit import TEMP_PREFIX
from embed_precompute.store.committed import check_null
from embed_precompute.store.index import DatasetIndex, index_dtypes
from embed_precompute.store.plan import Plan
from embed_precompute.store.records import (
    UnitPaths,
    committed_units,
    null_paths,
    read_manifest,
    read_plan,
    read_record,
    require_folder,
    stored_tensors,
    unit_paths,
)
from embed_precompute.store.sealed import FORMAT_VERSION
from embed_precompute.store.shards import ShardReader, StoredTensor

__all__ = ["Report", "check_derived", "check_units", "verify"]

DERIVED = ("manifest.json", "manifest.parquet", "index")
PROVENANCE = ("config.yaml", "run.json", "logs", "_quarantine")
SMALL_FILES = ("plan.json", "null.json", "null.safetensors")
MAX_NAMED_MISSING = 20
_UNIT_FILE = re.compile(r"shard-([0-9]{6,18})\.(?:safetensors|rows\.parquet|json)")


def verify(
    root: Path,
    level: Level = "full",
    *,
    num_samples: int = 32,
    seed: int | None = None,
    device: str = "auto",
) -> Report:
    """Check the dataset in `root`; InputError when there is none.

    The last three are for `deep`: how many samples are encoded again, which (a seed that is not
    given is drawn, and stands in the report), and where.
    """
    if level not in ("quick", "full", "deep"):
        raise InputError(f"level is {level!r}: expected quick, full or deep.")
    check = _begin(Path(root), level)
    check.plan_file()
    encode_again: Callable[[], None] | None = None
    if level == "deep" and check.plan is not None and check.tensors:
        # Not above: the encoders bring torch's whole weight, and transformers.
        from embed_precompute.audit.reencode import get_ready, reencode

        # A checkpoint that is not at hand must not come out after hours, in place of the report.
        ready = get_ready(check.root, check.plan, check.tensors, device)
        encode_again = functools.partial(
            reencode, check.report, check.plan, check.tensors, ready,
            num_samples=num_samples, seed=secrets.randbits(32) if seed is None else seed,
        )  # fmt: skip
    check.null_embedding()
    with contextlib.ExitStack() as stack:
        check.derived_files(stack)
        check.units()
    check.totals()
    check.stray_files()
    if encode_again is not None:
        encode_again()
    return check.report


def check_units(root: Path) -> Report:
    """A full check of plan, null embedding and units, each by itself; nothing derived is read."""
    check = _begin(Path(root), "full")
    check.plan_file()
    check.null_embedding()
    check.units()
    return check.report


def check_derived(root: Path) -> Report:
    """A full check of manifest.json, and of the files it lists against it."""
    check = _begin(Path(root), "full")
    check.plan_file()
    check.report.problems.clear()
    with contextlib.ExitStack() as stack:
        check.derived_files(stack)
    return check.report


def _begin(root: Path, level: Level) -> _Verification:
    require_folder(root)
    if not any(os.path.lexists(root / name) for name in ("plan.json", "manifest.json", "shards")):
        raise InputError(f"{root} holds no dataset: no plan.json, manifest.json or shards.")
    return _Verification(Report(root, level))


class _Verification:
    """One verification; its steps add what they find to the report."""

    def __init__(self, report: Report) -> None:
        self.report, self.root, self.full = report, report.root, report.level != "quick"
        report.finalised = os.path.lexists(self.root / "manifest.json")
        self.plan: dict[str, Any] | None = None
        self.manifest: dict[str, Any] | None = None
        self.tensors: tuple[StoredTensor, ...] = ()
        self.index: DatasetIndex | None = None
        self.table: SampleTable | None = None
        self.committed: list[int] = []
        self.sums = _Sums()

    def plan_file(self) -> None:
        path, before = self.root / "plan.json", len(self.report.problems)
        if self.report.is_file(path):
            self._check_plan(path)
        self.report.plan_rejected = len(self.report.problems) > before
        if self.report.plan_rejected:
            self.plan, self.tensors = None, ()  # the units are judged by their own records

    def _check_plan(self, path: Path) -> None:
        with self.report.checking(path):
            stored = read_plan(self.root)
            rebuilt = {**Plan.from_json(stored).to_json(), "digest": stored["digest"]}
            rebuilt["fingerprint"] = digest_of(stored["spec"])
            self._compare(path, stored, rebuilt)
            rows = sum(file["rows"] for file in stored["inputs"])
            if stored["num_rows"] > rows or (stored["limit"] is None and stored["num_rows"] < rows):
                self.report.problem(
                    path, f"num_rows {stored['num_rows']}", f"{rows}, as its inputs"
                )
            self.tensors = stored_tensors(stored["spec"])
            self.plan = stored

    def null_embedding(self) -> None:
        paths = null_paths(self.root)
        if not os.path.lexists(paths.record) and not self.report.finalised:
            self.report.null_missing = True
            return
        before = len(self.report.problems)
        if all([self.report.is_file(path) for path in (paths.record, paths.shard)]):
            self._check_null(paths)
        self.report.null_rejected = len(self.report.problems) > before

    def _check_null(self, paths: UnitPaths) -> None:
        with self.report.checking(paths.record):
            if self.plan is None:
                entry = read_record(self.root, None)["files"]["shard"]
                self.report.same_file(paths.shard, entry, digest=True)
                return
            check_null(self.root, self.plan, self.tensors)
            shard = ShardReader(paths.shard, self.plan["fingerprint"], None, self.tensors)
            check_rows(self.report, shard, self.tensors)

    def derived_files(self, stack: contextlib.ExitStack) -> None:
        """manifest.json, and the files it lists; opens index and manifest.parquet if sound."""
        path = self.root / "manifest.json"
        if not self.report.finalised or not self.report.is_file(path):
            return
        with self.report.checking(path):
            self.manifest = manifest = read_manifest(self.root)
            encoders = sorted(manifest["encoders"])
            index_files = [f"index/{name}.npy" for name in index_dtypes(encoders)]
            expected = {*SMALL_FILES, "manifest.parquet", *index_files}
            files = manifest["files"]
            if files.keys() != expected or any(
                entry.keys() != {"bytes", "sha256"} for entry in files.values()
            ):
                self.report.problem(path, f"files {sorted(files)}", f"those of {sorted(expected)}")
                return
            sound = {
                name: self.report.same_file(
                    self.root / name, files[name], digest=self.full or name in SMALL_FILES
                )
                for name in sorted(expected)
            }
            if all(sound[name] for name in index_files):
                with self.report.checking(self.root / "index"):
                    self._open_index()
            if sound["manifest.parquet"]:
                table = self.root / "manifest.parquet"
                with self.report.checking(table):
                    self.table = SampleTable(table, encoders, manifest["counts"]["samples"])
                    stack.callback(self.table.close)

    def _open_index(self) -> None:
        index = DatasetIndex(self.root)
        path = self.root / "index" / "shards.npy"
        ends = np.cumsum(index.shards[:, 1])
        starts = np.concatenate(([0], ends))
        if not np.array_equal(index.shards[:, 0], starts[:-1]) or starts[-1] != index.num_samples:
            self.report.problem(
                path, "units that do not follow one another", f"{index.num_samples} samples in all"
            )
        elif self.plan is not None and index.num_units != self.plan["num_units"]:
            self.report.problem(path, f"{index.num_units} units", self.plan["num_units"])
        elif list(index.encoders) == [tensor.name for tensor in self.tensors]:
            self.index = index

    def units(self) -> None:
        shards = self.root / "shards"
        with self.report.checking(shards):
            self.committed = sorted(committed_units(self.root))
        num_units = len(self.committed) if self.plan is None else self.plan["num_units"]
        self.report.num_units = num_units
        check = UnitCheck(self.report, self.plan, self.tensors, self.index, self.table)
        expected = 0
        for unit in self.committed:
            if self.plan is not None and unit >= num_units:
                path = unit_paths(self.root, unit).record
                self.report.problem(path, f"unit {unit}", f"only units below {num_units}")
                self.report.rejected_units.add(unit)
                continue
            if self.plan is not None:
                self._missing(expected, unit)
                expected = unit + 1
            self.sums.add(check.check(unit))
        if self.plan is not None:
            self._missing(expected, num_units)
        names = [tensor.name for tensor in self.tensors]
        repeated_ids(self.report, self.committed, names, check.id_hashes)

    def _missing(self, first: int, end: int) -> None:
        """Units from `first` to before `end` have no record."""
        if first >= end:
            return
        self.report.num_missing += end - first
        self.sums.add(None)
        if not self.report.finalised:
            return
        for unit in range(first, min(end, first + MAX_NAMED_MISSING)):
            path = unit_paths(self.root, unit).record
            self.report.problem(path, "no file", "a record: the dataset is finalised")
        if end - first > MAX_NAMED_MISSING:
            what = f"no record for units {first + MAX_NAMED_MISSING} to {end - 1} either"
            self.report.problem(self.root / "shards", what, "one for each")

    def totals(self) -> None:
        """The sums of the records against plan.json, and all of manifest.json but its files."""
        plan, manifest, sums = self.plan, self.manifest, self.sums
        if plan is None:
            return
        if sums.complete and sums.samples != plan["num_samples"]:
            self.report.problem(
                self.root / "plan.json", f"num_samples {plan['num_samples']}", sums.samples
            )
        if manifest is None:
            return
        expected: dict[str, Any] = {
            "format_version": FORMAT_VERSION,
            "kind": "dataset",
            "fingerprint": plan["fingerprint"],
            "plan": plan["plan"],
            "spec": plan["spec"],
            "encoders": {
                t.name: {"tensor": f"text_{t.name}", "pooled": t.pooled, "dim": t.dim}
                | {"dtype": t.dtype}
                for t in self.tensors
            },
        }
        if sums.complete:
            expected |= sums.manifest_fields(plan)
            found = {key: manifest[key] for key in manifest if key not in ("files", "digest")}
        else:
            found = {key: manifest.get(key) for key in expected}
        self._compare(self.root / "manifest.json", found, expected)

    def stray_files(self) -> None:
        """Notes for what nobody reads: leftovers, other names, units without a record."""
        for name in _names(self.root):
            if name not in (*SMALL_FILES, "shards", *DERIVED, *PROVENANCE):
                self._note(self.root / name)
        if self.tensors:
            expected = {f"{name}.npy" for name in index_dtypes([t.name for t in self.tensors])}
            for name in _names(self.root / "index"):
                if name not in expected:
                    self._note(self.root / "index" / name)
        committed = set(self.committed)
        for folder in _names(self.root / "shards"):
            for name in _names(self.root / "shards" / folder):
                path = self.root / "shards" / folder / name
                match = _UNIT_FILE.fullmatch(name)
                unit = int(match[1]) if match else -1
                if not match or unit_paths(self.root, unit).record.parent != path.parent:
                    self._note(path)
                elif unit not in committed:
                    self.report.notes.append(f"{path} has no record yet: a run goes on from there")

    def _note(self, path: Path) -> None:
        leftover = path.name.startswith(TEMP_PREFIX)
        what = "is a temporary file, of a run that goes on or died" if leftover else "is not ours"
        self.report.notes.append(f"{path} {what}")

    def _compare(self, path: Path, found: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
        """A problem for every field that differs; a field that is not there counts as absent."""
        old, new = flatten(found), flatten(expected)
        for name in sorted(old.keys() | new.keys()):
            is_now, should_be = (str(fields.get(name, "absent")) for fields in (old, new))
            if is_now != should_be:
                self.report.problem(path, f"{name} {is_now:.80}", f"{should_be:.80}")


class _Sums:
    """What the records add up to."""

    def __init__(self) -> None:
        self.complete = True
        """False once a record was missing or could not be read."""
        self.samples = self.stored = self.units = 0
        self.status: dict[str, int] = {}
        self.encoders: dict[str, dict[str, int]] = {}
        self.environments: dict[bytes, int] = {}
        self.digests = hashlib.sha256()

    def add(self, record: Mapping[str, Any] | None) -> None:
        if record is None:
            self.complete = False
            return
        self.units += 1
        self.samples += record["num_samples"]
        self.stored += record["num_stored"]
        _add(self.status, record["status"])
        for name, sums in record["encoders"].items():
            _add(self.encoders.setdefault(name, {}), sums)
        _add(self.environments, {canonical_json(record["environment"]): 1})
        self.digests.update(f"{record['digest']}\n".encode())

    def manifest_fields(self, plan: Mapping[str, Any]) -> dict[str, Any]:
        """The fields of manifest.json that follow from the records."""
        return {
            "counts": {
                "rows": plan["num_rows"],
                "samples": self.samples,
                "units": self.units,
                "stored": self.stored,
                "status": self.status,
                "encoders": self.encoders,
            },
            "environments": [
                {"environment": json.loads(environment), "units": units}
                for environment, units in sorted(self.environments.items())
            ],
            "records_sha256": self.digests.hexdigest(),
        }


def _add(sums: dict[Any, int], more: Mapping[Any, int]) -> None:
    for key, value in more.items():
        sums[key] = sums.get(key, 0) + value


def _names(folder: Path) -> Sequence[str]:
    """Names in a folder, sorted; none when it is not one, which is reported where it matters."""
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return ()
