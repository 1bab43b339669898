"""Embeddings that finished datasets have already, copied and not encoded again (`run --reuse`).

Guarantees: a stored row is copied if the sha256 of its text, as encoded, and the fingerprint of its
encoder are the same, and if its bytes have the checksum that the other dataset's index states. What
is damaged there is named and encoded. So within one environment the copies change no byte. What
was made in another environment is named in the record of each unit that holds a copy of it.
Costs: memory holds 16 bytes per distinct text of a dataset, from the first unit on; up to three
times as much while they are sorted. For each unit the rows parts are read that hold its texts: one
or two, if the captions come in about the same order as before. Copied rows are read twice, once for
their checksum.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from embed_precompute.documents import differing_fields, listed
from embed_precompute.errors import (
    ConflictError,
    EmbedPrecomputeError,
    IncompleteError,
    InputError,
    VerificationError,
    require,
)
from embed_precompute.steps import Work
from embed_precompute.store.index import DatasetIndex
from embed_precompute.store.records import (
    NULL_UNIT,
    Record,
    encoder_fingerprints,
    read_null_record,
    read_record,
    stored_tensors,
)
from embed_precompute.store.rows import columns_of, iter_batches, text_sha256
from embed_precompute.store.shards import ShardReader

log = logging.getLogger(__name__)
COPIED_FROM = "copied_from"
"""Key in a record's environment: the other environments, in which copied rows were made."""
BETWEEN = " | "


@dataclass
class Copies:
    """What is copied into one unit."""

    rows: dict[str, dict[int, dict[str, torch.Tensor]]] = field(default_factory=dict)
    """Encoder -> stored row -> suffix -> the embedding, mapped: [length, width] or [width]."""
    environment: dict[str, str] = field(default_factory=dict)
    """What the copies add to the environment in the unit's record."""
    num_damaged: int = 0
    """Number of rows that are encoded because their copy is damaged; the log names each unit."""


class Reuse:
    """The finished datasets that rows are copied from. For one thread."""

    def __init__(self, folders: Sequence[Path], root: Path, spec: Mapping[str, Any]) -> None:
        """`root` and `spec` are those of the dataset that is made.

        Raises InputError for a folder that holds no finished dataset, or none of the encoders.
        """
        self.folders = tuple(folders)
        with Work("opening the datasets of --reuse"):
            self._datasets = [_Dataset(folder, root, spec) for folder in folders]
        self._environment: Mapping[str, str] = {}
        self._warned: set[tuple[Path, int]] = set()

    def check_environment(
        self, environment: Mapping[str, str], on_change: Literal["warn", "refuse"]
    ) -> None:
        """Compares this run's environment with those of the datasets; to be called before `find`.

        Raises ConflictError if one differs and `on_change` is "refuse".
        """
        self._environment = environment
        warnings = []
        for dataset in self._datasets:
            others = (differing_fields(each, environment) for each in dataset.environments())
            if not (differing := next(filter(None, others), [])):
                continue
            message = (
                f"--reuse {dataset.root}: it was made in another environment "
                f"({'; '.join(differing)}). Equal bytes are promised within one environment only; "
                "the manifest lists all of them."
            )
            if on_change == "refuse":
                raise ConflictError(
                    f"{message} Leave --reuse out, or set runtime.on_environment_change warn."
                )
            warnings.append(message)
        # Not before: the log is a file in the output, and a refused run leaves nothing.
        for line in self.lines():
            log.info("%s", line)
        for message in warnings:
            log.warning("%s", message)

    def lines(self) -> list[str]:
        """What is copied from which dataset, and how the other encoders differ."""
        return [f"--reuse {each.root}: {line}" for each in self._datasets for line in each.lines]

    def count(self, texts: Sequence[str]) -> Counter[str]:
        """For each encoder, how many of `texts` the datasets have. No embedding is read, so damage
        does not show."""
        digests, found = [str(text_sha256(text)) for text in texts], dict[str, set[int]]()
        for dataset in self._datasets:
            rows = set().union(*dataset.look_up(digests, range(len(digests))).values())
            for name in dataset.encoders:
                found.setdefault(name, set()).update(rows)
        return Counter({name: len(rows) for name, rows in found.items()})

    def find(
        self, texts: Sequence[str], lengths: Mapping[str, Sequence[int]], *, null: bool
    ) -> Copies:
        """The embeddings of `texts`, a unit's stored rows, as far as the datasets have them.

        `lengths`: for each tensor, the number of vectors of each stored row. `null`: the unit is
        the null embedding.
        """
        copies, origins = Copies(), set()
        digests = [str(text_sha256(text)) for text in texts]
        for dataset in self._datasets:
            rows = {name: copies.rows.setdefault(name, {}) for name in dataset.encoders}
            left = [row for row in range(len(texts)) if any(row not in r for r in rows.values())]
            if not left:
                continue
            found = {NULL_UNIT: {0: 0}} if null else dataset.look_up(digests, left)
            for unit, samples in found.items():
                try:
                    source = dataset.open(unit)
                except (EmbedPrecomputeError, OSError) as error:
                    copies.num_damaged += len(samples)
                    self._warn_of(dataset.root, unit, error)
                    continue
                for row, sample in samples.items():
                    if not null and source.text_digest(sample) != digests[row]:
                        continue  # only 64 bits of the two digests are equal
                    for name in [name for name in rows if row not in rows[name]]:
                        expected = {t: lengths[name + t][row] for t in dataset.suffixes(name)}
                        try:
                            made = source.embeddings(dataset.encoders[name], sample, expected)
                        except EmbedPrecomputeError as error:
                            copies.num_damaged += 1
                            self._warn_of(dataset.root, unit, error)
                            continue
                        rows[name][row] = made
                        origins |= _origins(source.record.environment)
        if others := sorted(origins - _origins(self._environment)):
            copies.environment[COPIED_FROM] = BETWEEN.join(others)
        return copies

    def _warn_of(self, root: Path, unit: int, error: Exception) -> None:
        """Logs damage of a unit of a dataset once: other units may ask for its rows, too."""
        if (root, unit) not in self._warned:
            self._warned.add((root, unit))
            log.warning("--reuse: %s This run encodes what is damaged there.", error)


def _origins(environment: Mapping[str, str]) -> set[str]:
    """The environments that the rows of a unit were made in, as text."""
    own = (f"{key} {value}" for key, value in sorted(environment.items()) if key != COPIED_FROM)
    copied = environment.get(COPIED_FROM)
    return {", ".join(own), *(copied.split(BETWEEN) if copied else ())}


@dataclass(frozen=True)
class _Source:
    """An opened unit of a finished dataset, or its null embedding."""

    index: DatasetIndex
    record: Record
    shard: ShardReader
    text_digests: Sequence[str | None] = ()
    first_sample: int = 0

    def text_digest(self, sample: int) -> str | None:
        position = sample - self.first_sample
        return self.text_digests[position] if 0 <= position < len(self.text_digests) else None

    def embeddings(
        self, encoder: str, sample: int, lengths: Mapping[str, int]
    ) -> dict[str, torch.Tensor]:
        """By suffix, what an encoder made of a sample; `lengths`: the vectors expected of each.

        Raises VerificationError if the bytes are not those that the index states.
        """
        made = {}
        for suffix, length in lengths.items():
            name = encoder + suffix
            if self.record.number == NULL_UNIT:
                row, checksum = 0, int(self.shard.checksums(name)[0])
            else:
                row = int(self.index.index[sample])
                checksum = int(self.index.checksums[name][sample])
            values = self.shard.row(name, row)
            sound = self.shard.check_row(name, row)
            sound = sound and int(self.shard.checksums(name)[row]) == checksum
            if not sound or self.shard.length(name, row) != length:
                raise VerificationError(
                    f"{self.shard.path} is damaged: row {row} of text_{name} is not the one that "
                    "its index states."
                )
            made[suffix] = values
        return made


class _Dataset:
    """A finished dataset that has an encoder of the one that is made."""

    def __init__(self, root: Path, made: Path, spec: Mapping[str, Any]) -> None:
        self.root = root
        require(
            root.is_dir(), f"--reuse {root} is not a folder: expected the output.path of a run."
        )
        if os.path.realpath(root) == os.path.realpath(made):
            raise InputError(
                f"--reuse {root} is the output itself: a run goes on with it anyway. Name another "
                "dataset, or write to a new output.path."
            )
        try:
            self._index = DatasetIndex(root)
        except IncompleteError:
            raise InputError(
                f"--reuse {root} holds no finished dataset: no manifest.json. Name another, or "
                "finish it with its own command first."
            ) from None
        except VerificationError as error:
            raise VerificationError(
                f"--reuse {root}: {error} First run `embed-precompute repair {root}`, and what it "
                "says then; after that this command again."
            ) from error
        old_spec = self._index.manifest.spec
        self._tensors = stored_tensors(old_spec)
        by_fingerprint = {each: name for name, each in encoder_fingerprints(old_spec).items()}
        wanted = encoder_fingerprints(spec)
        self.encoders = {n: by_fingerprint[f] for n, f in wanted.items() if f in by_fingerprint}
        """Encoder of the dataset that is made -> its name here."""
        others = []
        for name in sorted(wanted.keys() - self.encoders.keys()):
            lines = _differing(name, old_spec, spec)
            others += [line for line in lines if line not in others]
        if not self.encoders:
            raise InputError(
                f"--reuse {root} has none of this run's encoders:\n  {listed(others)}\nLeave it "
                "out, or give the encoder back that it was made with."
            )
        self.lines = [f"{', '.join(self.encoders)}: copied where the text is the same"]
        """For the log: what is copied, and how the other encoders differ."""
        self.lines += [f"another encoder: {line}" for line in others]

    def environments(self) -> list[dict[str, str]]:
        """All that its units and its null embedding were made in."""
        found = [each.environment for each in self._index.manifest.environments]
        with contextlib.suppress(EmbedPrecomputeError):  # damaged: `find` names it
            found.append(read_null_record(self.root).environment)
        return found

    def suffixes(self, name: str) -> list[str]:
        """The outputs of an encoder, by its name in the dataset that is made."""
        encoder = self.encoders[name]
        return [t.name.removeprefix(encoder) for t in self._tensors if t.encoder == encoder]

    def look_up(self, digests: Sequence[str], rows: Sequence[int]) -> dict[int, dict[int, int]]:
        """Unit -> row of `rows` -> the sample whose text probably has its digest."""
        hashes, samples = self._texts
        found: dict[int, dict[int, int]] = {}
        if len(hashes):
            wanted = np.array([_hash(digests[row]) for row in rows], np.uint64)
            at = np.minimum(np.searchsorted(hashes, wanted), len(hashes) - 1)
            for row, place, is_equal in zip(rows, at, hashes[at] == wanted, strict=True):
                if is_equal:
                    sample = int(samples[place])
                    found.setdefault(int(self._index.shard[sample]), {})[row] = sample
        return found

    def open(self, unit: int) -> _Source:
        """Opens a unit. Raises EmbedPrecomputeError or OSError if it is damaged or gone."""
        fingerprint, tensors = self._index.manifest.fingerprint, self._tensors
        if unit == NULL_UNIT:
            null = read_null_record(self.root)
            shard = ShardReader(null.shard_path(self.root), fingerprint, unit, tensors)
            return _Source(self._index, null, shard)
        shard = ShardReader(self._index.shard_path(unit), fingerprint, unit, tensors)
        record = read_record(self.root, unit)
        batches = iter_batches(
            record.rows_path(self.root), tensors, text=False, num_rows=record.num_samples
        )
        text_digests = [d for batch in batches for d in batch.column("text_sha256").to_pylist()]
        first_sample = int(self._index.shards[unit, 0])
        return _Source(self._index, record, shard, text_digests, first_sample)

    @functools.cached_property
    def _texts(self) -> tuple[np.ndarray, np.ndarray]:
        """64 bits of each text's sha256, ascending, and the first sample that has the text."""
        parts = columns_of(self.root, self._tensors, ["text_sha256"])
        digests = (digest for part in parts for digest in part["text_sha256"])
        every, samples = np.fromiter(map(_hash, digests), np.uint64), self._index.ok
        in_range = (samples >= 0) & (samples < len(self._index))
        if len(samples) != len(every) or not in_range.all():
            raise VerificationError(
                f"{self.root / 'index' / 'ok.npy'} does not fit manifest.parquet. "
                f"`embed-precompute finalize {self.root}` makes it again."
            )
        hashes, first = np.unique(every, return_index=True)
        return hashes, samples[first]


def _hash(digest: str) -> int:
    return int(digest[:16], 16)


def _differing(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """How an encoder differs from the one of the same name in another dataset."""
    if name not in old["encoders"]:
        return [f"encoders.{name}: it has {', '.join(sorted(old['encoders']))}"]
    pairs = [
        {"encoders": {name: each["encoders"][name]}, "output": each["output"]}
        for each in (old, new)
    ]
    return differing_fields(*pairs)
