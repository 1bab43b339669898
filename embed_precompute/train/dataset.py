"""Finished embeddings for training: a map-style dataset over its folders, and its collate.

`EmbeddingDataset` has the samples whose status is ok, in input order, by index or by id. Folders of
different fingerprints are never mixed. A shard that is missing, cut or of another dataset is an
error that names it; with `verify="rows"` so is a changed bit in a row. A tensor that is returned
owns its memory.

One object may be used by several threads. It may be forked, and a pickled one holds no mapped file:
each process maps the files that it reads. Opening reads the manifest.json of each folder, and the
first look-up maps the index, without private memory. Opening several folders compares the hashes of
all ids, with 16 bytes a sample while it lasts. A sample is one copy out of the mapped shard.
Imports torch and numpy; pyarrow only for texts and columns of the manifest, and no transformers.
"""

from __future__ import annotations

import contextlib
import functools
import operator
import os
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from itertools import accumulate, chain, islice
from pathlib import Path
from typing import Any, Literal, overload

import numpy as np
import torch
import xxhash
from torch.utils.data import Dataset, default_collate

from embed_precompute.documents import differing_fields, digest_of, listed
from embed_precompute.errors import ConflictError, IncompleteError, InputError, VerificationError
from embed_precompute.samples import Status
from embed_precompute.store.index import (
    Array,
    DatasetIndex,
    Manifest,
    TensorEntry,
    read_manifest,
)
from embed_precompute.store.plan import read_plan
from embed_precompute.store.records import (
    NULL_UNIT,
    Positions,
    StoredTensor,
    read_null_record,
    read_record,
    stored_tensors,
)
from embed_precompute.store.shards import ShardReader

AnyPath = str | os.PathLike[str]
TOKEN_MASK = "_token_mask"
"""text_<name> + this: which vectors of a sequence are of real tokens."""
IDS_AT_ONCE = 65_536
NAMED = 3
"""Ids that a message names."""


class SampleLookupError(InputError, KeyError):
    """No embedding for an id: it is not in the dataset, or its sample's status is not ok."""

    has_sample = False
    """Whether the dataset has a sample of this id, with another status than ok."""

    __str__ = Exception.__str__  # KeyError would show the message in quotes


class _Folder:
    """One folder of a dataset. Pickles without its mapped index."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.manifest = _read_manifest(root)
        self.fingerprint = self.manifest.fingerprint
        self.tensors = stored_tensors(self.manifest.spec)
        self.num_ok = self.manifest.counts.status[Status.OK.label]
        ok = self.manifest.files["index/ok.npy"].sha256
        self.samples = {"plan": self.manifest.plan_id, "ok": ok}
        self._index: DatasetIndex | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_index": None}

    @property
    def index(self) -> DatasetIndex:
        """The mapped index, opened when first asked for."""
        index = self._index
        if index is None:
            index = DatasetIndex(self.root)
            if index.manifest.digest != self.manifest.digest:
                raise VerificationError(
                    f"{self.root} was finalised again since it was opened: open the dataset again."
                )
            self._index = index
        return index

    def shard(self, unit: int) -> ShardReader:
        """The shard of a unit, or of the null embedding (NULL_UNIT), mapped."""
        if unit == NULL_UNIT:
            path = read_null_record(self.root).shard_path(self.root)
        else:
            path = self.index.shard_path(unit)
        return ShardReader(path, self.fingerprint, unit, self.tensors)

    def sample_id(self, sample: int) -> str:
        try:
            return self.index.sample_id(sample)
        except ValueError as error:
            raise self.damaged(f"the id of sample {sample} is not UTF-8 ({error})") from error

    def ok(self) -> Array:
        """The numbers of the samples whose status is ok, checked; [num_ok]."""
        found = self.index.ok
        if len(found) and not (found[0] >= 0 and found[-1] < self.index.num_samples):
            raise self.damaged(f"ok.npy holds {found[0]} to {found[-1]}")
        if (found[1:] <= found[:-1]).any():
            raise self.damaged("ok.npy does not rise")
        return found

    def ids(self) -> Iterator[str]:
        """The ids of the samples whose status is ok, some thousand at a time: 0.3 us each."""
        ok, offsets = self.ok(), self.index.arrays["id_offsets"]
        for begin in range(0, len(ok), IDS_AT_ONCE):
            samples = ok[begin : begin + IDS_AT_ONCE]
            bounds = offsets[samples[0] : samples[-1] + 2]
            raw = self.index.arrays["ids"][bounds[0] : bounds[-1]].tobytes()
            bounds, own = bounds - bounds[0], samples - samples[0]
            for start, end in zip(bounds[own].tolist(), bounds[own + 1].tolist(), strict=True):
                yield raw[start:end].decode()

    def ok_hashes(self) -> Array:
        """The hashes of the ids of the samples whose status is ok, sorted; [num_ok]."""
        hashes, order = self.index.arrays["id_hash"], self.index.arrays["id_order"]
        if self.num_ok == len(hashes):
            return hashes
        try:
            found: Array = hashes[self.index.status[order] == Status.OK]
            return found
        except IndexError as error:
            raise self.damaged(f"id_order.npy: {error}") from error

    def status(self, sample: int) -> str:
        """The label of a sample's status."""
        try:
            return Status(int(self.index.status[sample])).label
        except ValueError as error:
            raise self.damaged(f"status.npy: {error}, sample {sample}") from None

    @functools.cached_property
    def _caption_column(self) -> tuple[str | tuple[str, ...], bool]:
        """The plan's text_column, and whether some row has several captions."""
        plan = read_plan(self.root)
        return plan.inputs.text_column, plan.num_samples > plan.num_rows

    def captions_of(self, row_id: str) -> Iterator[int]:
        """The samples of a row with several captions."""
        return self.index.captions_of(row_id, self._caption_column[0])

    def is_caption_of(self, row_id: str, name: str) -> bool:
        """Whether the sample `row_id#name` of this folder is a caption of the row `row_id`.

        Where a row has one caption, an id may hold a # of its own: `clip#1` is then another row
        than `clip`.
        """
        column, has_lists = self._caption_column
        if not isinstance(column, str):
            return name in column
        if has_lists:
            return name.isdecimal()
        # Lists of one caption, or no lists: the latter where a sample has the row's id.
        return name == "0" and self.index.find(row_id) is None

    def damaged(self, found: object) -> VerificationError:
        return VerificationError(
            f"{self.root / 'index'} is damaged: {found}. `embed-precompute verify {self.root}` "
            f"names the file, `embed-precompute finalize {self.root}` makes the index again."
        )


class EmbeddingDataset(Dataset[dict[str, Any]]):
    """The samples of a finished dataset whose status is ok, in input order.

    `path` is the dataset's folder, or a list of folders with one fingerprint, whose samples follow
    one another. `verify="rows"` checks every row that is read against its checksum in the index;
    `"never"` checks headers, sizes and lengths only. `copy=False` gives tensors that share the
    mapped file. It is for callers that copy them anyway, such as `collate_embeddings`, and never
    write to a tensor or send one to another process. At most `max_open_shards` shards stay mapped.

    Raises InputError for a folder that holds no dataset, IncompleteError for one that is not
    finalised, VerificationError for damage; ConflictError for folders of different fingerprints,
    and for folders that both have an embedding for the same id.
    """

    def __init__(
        self,
        path: AnyPath | Sequence[AnyPath],
        verify: Literal["never", "rows"] = "never",
        *,
        copy: bool = True,
        max_open_shards: int = 256,
    ) -> None:
        if verify not in ("never", "rows"):
            raise InputError(f"verify is {verify!r}: expected 'never' or 'rows'.")
        if max_open_shards < 1:
            raise InputError(f"max_open_shards is {max_open_shards}: expected 1 or more.")
        paths = [path] if isinstance(path, (str, os.PathLike)) else list(path)
        if not paths:
            raise InputError("no folder is given: expected at least one dataset.")
        # Absolute, so that a worker that is started elsewhere finds the same files.
        self.roots = [Path(each).absolute() for each in paths]
        self._folders = [_Folder(root) for root in self.roots]
        first = self._folders[0]
        for other in self._folders[1:]:
            if other.fingerprint != first.fingerprint:
                lines = differing_fields(first.manifest.spec, other.manifest.spec)
                raise ConflictError(
                    f"{first.root} and {other.root} hold different embeddings; they differ in\n  "
                    + listed(lines)
                    + "\nOnly folders of one fingerprint are one dataset: open these apart."
                )
        if len(self._folders) > 1:
            _check_ids_once(self._folders)
        self._ends = list(accumulate(folder.num_ok for folder in self._folders))
        self._verify_rows, self._copy = verify == "rows", copy
        self._max_open_shards = max_open_shards
        self._shards: dict[tuple[int, int], ShardReader] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_shards": {}}

    @property
    def manifest(self) -> Manifest:
        """The content of manifest.json; of the first folder's, when there are several."""
        return self._folders[0].manifest

    @property
    def fingerprint(self) -> str:
        """The identity of what a caption becomes; equal for all folders."""
        return self._folders[0].fingerprint

    @property
    def samples_digest(self) -> str:
        """Says which captions the samples are: a digest of each folder's plan and ok samples.

        Datasets of equal digest and fingerprint have the same caption at every index. The state of
        an EmbeddingLoader holds both.
        """
        return digest_of([folder.samples for folder in self._folders])

    @property
    def tensors(self) -> dict[str, TensorEntry]:
        """By name without `text_`: its encoder, whether per token or per caption, width, dtype."""
        return self.manifest.tensors

    @property
    def ids(self) -> SampleIds:
        """The ids of all samples, in their order; read from the mapped index when asked for."""
        return SampleIds(self)

    @property
    def lengths(self) -> dict[str, Array]:
        """By name without `text_`: the stored vectors of each sample, int32 [len(dataset)].

        An array is the mapped index itself where there is one folder and every sample in it is ok.
        Otherwise it is gathered anew at each access: 4 bytes a sample.
        """
        return {name: self._column(f"length_{name}") for name in self.tensors}

    @property
    def tokens(self) -> dict[str, Array]:
        """By encoder: the tokens of each sample's caption, special tokens included and pads not.

        Arrays as in `lengths`.
        """
        encoders = sorted({tensor.encoder for tensor in self.tensors.values()})
        return {name: self._column(f"tokens_{name}") for name in encoders}

    def _column(self, name: str) -> Array:
        """An array of the index for the samples whose status is ok, of all folders; read-only."""
        parts = []
        for folder in self._folders:
            values = folder.index.arrays[name]
            parts.append(values if folder.num_ok == len(values) else values[folder.ok()])
        found = parts[0] if len(parts) == 1 else np.concatenate(parts)
        found.flags.writeable = False
        return found

    def positions(self, tensor: str) -> Positions | None:
        """Which positions of a caption a tensor stores: all of a padded length, the real ones, or
        these and the first pad (real+1). None: it has a vector per caption."""
        of_name = {f"text_{each.name}": each for each in self._folders[0].tensors}
        return of_name[tensor].positions

    @property
    def null(self) -> dict[str, torch.Tensor]:
        """The encoding of the empty caption, from the first folder: a sample without an id."""
        folder, reader = self._folders[0], self._shard(0, NULL_UNIT)
        if reader.num_rows != 1:
            raise VerificationError(f"{reader.path} has {reader.num_rows} rows: expected 1.")
        for tensor in folder.tensors:
            if self._verify_rows and not reader.check_row(tensor.name, 0):
                raise VerificationError(
                    f"{reader.path} is damaged: text_{tensor.name} does not have its checksum."
                )
        null: dict[str, torch.Tensor] = {}
        record = read_null_record(folder.root)
        for tensor in folder.tensors:
            values = reader.row(tensor.name, 0).clone()
            tokens = record.encoders[tensor.encoder].tokens
            null |= _with_mask(tensor, values, tokens)
        return null

    def __len__(self) -> int:
        return self._ends[-1]

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Sample `i`: {"id": str, "text_<name>": Tensor [L, D], or [C] when pooled, ...}.

        With each sequence comes text_<name>_token_mask, bool [L]: True for the caption's tokens,
        False for pads. Where pads are stored, this is the tokenizer's mask; otherwise it is True
        throughout. L is 0 where an empty caption stores nothing.
        """
        return self._sample(*self._locate(i))

    def __getitems__(self, indexes: Sequence[int]) -> list[dict[str, Any]]:
        """The samples of a batch, in the order of `indexes`; they are read in stored order."""
        located = [self._locate(i) for i in indexes]
        samples: list[dict[str, Any]] = [{}] * len(located)
        for k in sorted(range(len(located)), key=located.__getitem__):
            samples[k] = self[indexes[k]]  # a subclass's own __getitem__, if it has one
        return samples

    def __repr__(self) -> str:
        where = ", ".join(map(str, self.roots))
        shapes = [
            f"text_{name} [{'' if tensor.per == 'caption' else 'L, '}{tensor.width}] {tensor.dtype}"
            for name, tensor in self.tensors.items()
        ]
        return f"EmbeddingDataset({where}: {len(self):,} samples, {', '.join(shapes)})"

    def index_of(self, sample_id: str | int) -> int:
        """The index of the sample with this id; SampleLookupError when it has no embedding.

        Ids of an integer column, and row numbers, may be given as numbers.
        """
        sample_id = str(sample_id)
        failed: str | None = None
        for number, folder in enumerate(self._folders):
            index = folder.index
            sample = index.find(sample_id)
            if sample is None:
                continue
            if index.status[sample] == Status.OK:
                at = int(np.searchsorted(index.ok, np.int64(sample)))
                if at >= folder.num_ok or index.ok[at] != sample:
                    raise folder.damaged(f"ok.npy lacks sample {sample} ({sample_id!r})")
                return self._start(number) + at
            failed = failed or (
                f"sample {sample_id!r} has no embedding: its status is {folder.status(sample)}. "
                f"`embed-precompute info {folder.root} --id {sample_id}` says why."
            )
        where = ", ".join(map(str, self.roots))
        error = SampleLookupError(
            failed or f"sample {sample_id!r} is not in {where}.{self._captions_of(sample_id)}"
        )
        error.has_sample = failed is not None
        raise error

    def _captions_of(self, row_id: str) -> str:
        """A hint, where the id is that of a row with several captions."""
        found: list[str] = []
        for folder in self._folders:
            for sample in islice(folder.captions_of(row_id), 8):
                status = folder.status(sample)
                without = "" if status == Status.OK.label else f" (no embedding: {status})"
                found.append(folder.sample_id(sample) + without)
        return f" It has a sample for each caption of the row: {', '.join(found)}." if found else ""

    def encoded_text(self, i: int) -> str:
        """The text that was encoded for sample `i`: its caption after normalisation and recipe."""
        from embed_precompute.store.rows import read_samples  # with pyarrow

        number, sample = self._locate(i)
        folder = self._folders[number]
        unit = int(folder.index.shard[sample])
        part = read_record(folder.root, unit).rows_path(folder.root)
        first = int(folder.index.shards[unit, 0])
        stored = next(islice(read_samples(part, folder.tensors), sample - first, None), None)
        if stored is None or stored.text is None:
            raise folder.damaged(f"{part} has no text for sample {sample}")
        return stored.text

    def columns(self, *names: str) -> Iterator[dict[str, list[Any]]]:
        """Columns of manifest.parquet, such as text_sha256 and t5_tokens, in the order of samples.

        Gives parts of some thousand samples, one after another. Imports pyarrow.
        """
        from embed_precompute.store.rows import columns_of

        for folder in self._folders:
            left = folder.num_ok
            for part in columns_of(folder.root, folder.tensors, names):
                left -= len(part[names[0]])
                yield part
            if left:
                raise folder.damaged(f"manifest.parquet has {folder.num_ok - left} samples ok")

    def _start(self, number: int) -> int:
        return self._ends[number - 1] if number else 0

    def _locate(self, i: int) -> tuple[int, int]:
        """(folder, sample number in it) of index `i`."""
        if not hasattr(i, "__index__"):
            raise InputError(
                f"the index is {i!r}: expected an integer. For an id there is index_of, for "
                "several samples torch.utils.data.Subset."
            )
        position = operator.index(i)
        if position < 0:
            position += len(self)
        if not 0 <= position < len(self):
            raise IndexError(f"index {i} is out of range: the dataset has {len(self)} samples.")
        number = bisect_right(self._ends, position)
        folder = self._folders[number]
        sample = int(folder.index.ok[position - self._start(number)])
        if not 0 <= sample < folder.index.num_samples:
            raise folder.damaged(f"ok.npy holds {sample} of {folder.index.num_samples} samples")
        return number, sample

    def _sample(self, number: int, sample: int) -> dict[str, Any]:
        folder = self._folders[number]
        index, sample_id = folder.index, folder.sample_id(sample)
        row = int(index.index[sample])
        try:
            reader = self._shard(number, int(index.shard[sample]))
        except VerificationError as error:
            raise VerificationError(f"sample {sample_id!r}: {error}") from error
        found: dict[str, Any] = {"id": sample_id}
        for tensor in folder.tensors:
            name, wrong = tensor.name, ""
            # Not an IndexError: to whoever iterates by index, that would be the dataset's end.
            if not 0 <= row < reader.num_rows:
                wrong = f"no row {row}, it has {reader.num_rows}"
            elif (length := reader.length(name, row)) != (said := index.lengths[name][sample]):
                wrong = f"{length} vectors in row {row} of text_{name}: the index says {said}"
            else:
                values = reader.row(name, row)
                values = values.clone() if self._copy else values
                found |= _with_mask(tensor, values, int(index.tokens[tensor.encoder][sample]))
                if self._verify_rows:
                    raw = values.reshape(-1).view(torch.uint8).numpy().data
                    digest, stored = xxhash.xxh3_64_intdigest(raw), index.checksums[name][sample]
                    if digest != int(stored):
                        wrong = f"checksum {digest:016x} of row {row} of text_{name}: the index "
                        wrong += f"says {int(stored):016x}"
            if wrong:
                raise VerificationError(
                    f"{reader.path} is damaged at sample {sample_id!r}: found {wrong}. "
                    f"`embed-precompute verify {folder.root}` checks all of it."
                )
        return found

    def _shard(self, number: int, unit: int) -> ShardReader:
        """The shard's reader, mapped at most once while it is among the last used.

        A dict in order of use, without a lock: a fork may come while another thread holds one. The
        worst a race of threads does is to map a shard twice.
        """
        key = (number, unit)
        reader = self._shards.pop(key, None) or self._folders[number].shard(unit)
        self._shards[key] = reader
        while len(self._shards) > self._max_open_shards:
            with contextlib.suppress(RuntimeError, StopIteration):  # another thread was faster
                self._shards.pop(next(iter(self._shards)), None)
        return reader


class SampleIds(Sequence[str]):
    """The ids of a dataset, in the order of its samples; none is read before it is asked for."""

    def __init__(self, dataset: EmbeddingDataset) -> None:
        self._dataset = dataset

    def __len__(self) -> int:
        return len(self._dataset)

    @overload
    def __getitem__(self, i: int) -> str: ...
    @overload
    def __getitem__(self, i: slice) -> list[str]: ...
    def __getitem__(self, i: int | slice) -> str | list[str]:
        if isinstance(i, slice):
            return [self[k] for k in range(*i.indices(len(self)))]
        number, sample = self._dataset._locate(i)
        return self._dataset._folders[number].sample_id(sample)

    def __iter__(self) -> Iterator[str]:
        return chain.from_iterable(folder.ids() for folder in self._dataset._folders)

    def __repr__(self) -> str:
        first = ", ".join(map(repr, self[:3]))
        return f"SampleIds({len(self):,}: {first}{', ...' if len(self) > 3 else ''})"


def _check_ids_once(folders: Sequence[_Folder]) -> None:
    """ConflictError where an id has an embedding in two folders: it would be trained twice."""
    # Stable, because numpy then merges what is sorted already.
    hashes = np.sort(np.concatenate([folder.ok_hashes() for folder in folders]), kind="stable")
    twice = np.unique(hashes[1:][hashes[1:] == hashes[:-1]])
    named: dict[str, list[Path]] = {}
    for hashed in twice:
        ids: dict[str, list[Path]] = {}
        for folder in folders:
            for sample in folder.index.of_hash(hashed):
                if folder.index.status[sample] == Status.OK:
                    ids.setdefault(folder.sample_id(sample), []).append(folder.root)
        named |= {sample_id: roots for sample_id, roots in ids.items() if len(roots) > 1}
        if len(named) >= NAMED:
            break
    if named:
        some = ", ".join(map(repr, named)) + (", ..." if len(twice) > len(named) else "")
        both = " and ".join(map(str, next(iter(named.values()))))
        raise ConflictError(
            f"{len(twice):,} ids have an embedding in more than one folder, and would be samples "
            f"twice: {some} (in {both}). Give each folder once, and folders of other ids; row "
            "numbers are ids where a dataset was made without an id column."
        )


def _with_mask(tensor: StoredTensor, values: torch.Tensor, tokens: int) -> dict[str, torch.Tensor]:
    """A sample's entries for a tensor: text_<name>, and for a sequence text_<name>_token_mask."""
    name = f"text_{tensor.name}"
    if tensor.per_caption:
        return {name: values}
    real = len(values)
    if tensor.positions != "real":  # a template's tokens that were kept are not in `tokens`
        real = min(tokens + tensor.template_stored, real)
    mask = torch.arange(len(values)) < real
    if tensor.padding_side == "left":
        mask = mask.flip(0)
    return {name: values, name + TOKEN_MASK: mask}


def _read_manifest(root: Path) -> Manifest:
    try:
        if not root.is_file():
            return read_manifest(root)
    except FileNotFoundError:
        if (root / "plan.json").is_file():
            raise IncompleteError(
                f"{root} is not finished: no manifest.json. Run the job again, or "
                f"`embed-precompute finalize {root}` when `embed-precompute status {root}` shows "
                "no unit left."
            ) from None
    what = "holds no dataset: no manifest.json" if root.is_dir() else "is not a folder"
    raise InputError(f"{root} {what}. Expected the output.path of a finished run.")


def collate_embeddings(
    samples: Sequence[Mapping[str, Any]], length: int | None = None
) -> dict[str, Any]:
    """A batch of B samples, sequences padded with zeros to the longest, or all to `length`.

    Gives "id" list[str] if the samples have ids; for a pooled encoder text_<name> [B, C]; for the
    others text_<name> [B, L, D], text_<name>_length int64 [B], and two masks, bool [B, L]:
    text_<name>_mask, True where a vector was stored (pads too, where the dataset keeps them), and
    text_<name>_token_mask, True where that vector is of a caption's token.
    dtypes are kept. What else the samples hold, such as a video, goes through torch's
    default_collate. A sample longer than `length` is an InputError: nothing is cut. Use it as
    `collate_fn`, a fixed length with `functools.partial(collate_embeddings, length=512)`.
    """
    if not samples:
        raise InputError("a batch without samples: expected at least one.")
    keys = samples[0].keys()
    batch: dict[str, Any] = {}
    for sample in samples:
        if sample.keys() != keys:
            raise InputError(f"samples of one batch have keys {sorted(keys)} and {sorted(sample)}.")
    ids = [str(sample.get("id", "?")) for sample in samples]
    masks = {key + TOKEN_MASK for key in keys if key.startswith("text_")} & keys
    for key in [key for key in keys if key not in masks]:
        values = [sample[key] for sample in samples]
        if key == "id":
            made: dict[str, Any] = {key: values}
        elif key.startswith("text_") and torch.is_tensor(values[0]) and values[0].dim() == 2:
            made = _pad(key, values, length, ids)
            if key + TOKEN_MASK in masks:
                made[key + TOKEN_MASK] = mask = torch.zeros_like(made[f"{key}_mask"])
                for line, sample in zip(mask, samples, strict=True):
                    real = sample[key + TOKEN_MASK]
                    line[: len(real)] = real
        else:
            made = {key: _default(key, values, ids)}
        if clash := batch.keys() & made.keys():
            raise InputError(f"two keys would both make {sorted(clash)}: use your own collate.")
        batch |= made
    return batch


def _default(key: str, values: list[Any], ids: Sequence[str]) -> Any:
    try:
        return default_collate(values)
    except (TypeError, RuntimeError, LookupError, ValueError) as error:
        some = ", ".join(ids[:3]) + (", ..." if len(ids) > 3 else "")
        raise InputError(
            f"{key!r} of the samples {some} makes no batch: {error}. Give equal shapes, pop it, or "
            "use a collate_fn of your own."
        ) from error


def _pad(
    key: str, values: Sequence[torch.Tensor], length: int | None, ids: Sequence[str]
) -> dict[str, torch.Tensor]:
    lengths = [len(value) for value in values]
    longest = max(lengths)
    if length is not None and longest > length:
        raise InputError(
            f"sample {ids[lengths.index(longest)]!r} has {longest} vectors in {key}, more than "
            f"length={length}: embeddings are never cut. Give a length of {longest} or more."
        )
    padded_length = longest if length is None else length
    batch = values[0].new_empty((len(values), padded_length, values[0].shape[1]))  # [B, L, D]
    for line, value in zip(batch, values, strict=True):
        line[: len(value)] = value
        line[len(value) :] = 0
    real = torch.tensor(lengths)
    mask = torch.arange(padded_length) < real[:, None]  # [B, L]
    return {key: batch, f"{key}_length": real, f"{key}_mask": mask}
