"""Open-Sora v2's cached-text dataset class, reading our shards directly: no second copy.

`PrecomputedVideoTextDataset` is Open-Sora's own `CachedVideoTextDataset` in all but where
`text_t5` and `text_clip` come from. They are, bit for bit, what an export would have stored. A row
without an embedding is dropped and counted, or refused, before the sampler sees it. An embedding
that cannot be read ends the training with its message and is never replaced by zeros. Where the
length of a text depends on the bucket of its clip, the bucket says which folder it is taken from.

At the start the text that the trainer would encode for each row is compared with the text that was
encoded, so neither a wrong id column nor changed captions can pair a clip with the wrong text. That
takes about 30 us a row and folder; afterwards a sample is one copy out of the mapped shard.

In Open-Sora's configuration:

    custom_imports = dict(imports=["embed_precompute.opensora.dataset"], allow_failed_imports=False)
    dataset = dict(type="precomputed_video_text", embeddings="out", data_path="table.parquet", ...)
    cached_text = True

Written from opensora/datasets/datasets.py of https://github.com/hpcaitech/Open-Sora (Apache-2.0).
"""

from __future__ import annotations

import hashlib
import importlib
import logging
import numbers
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.nn import functional

from embed_precompute.captions.recipes import (
    OPENSORA_NO_FPS,
    OpenSoraRecipe,
    make_normalizer,
    recipe_of,
)
from embed_precompute.distributed import DistContext
from embed_precompute.encoders.video_buckets import Bucket
from embed_precompute.errors import ConflictError, InputError
from embed_precompute.opensora.lengths import (
    NO_CACHED_TEXT,
    TRAINER_PATCH,
    TextLengths,
    made_for_patch,
)
from embed_precompute.store.index import Array
from embed_precompute.store.manifest import finished_plan
from embed_precompute.store.plan import Plan
from embed_precompute.train.dataset import AnyPath, EmbeddingDataset, SampleLookupError
from embed_precompute.train.inputs import pad_null

log = logging.getLogger(__name__)

REGISTERED_NAME = "precomputed_video_text"
CLASS_NAME = "PrecomputedVideoTextDataset"
SAMPLE_ID = "sample_id"
"""The column of an exported table that holds the sample's id."""
DONE_FILE = "export.json"
"""A finished export has it in the folder of its table."""
TEXT, FPS, MOTION = "text", "fps", "score_vmafmotion"
"""The columns that Open-Sora makes its text of."""
ROWS_AT_ONCE = 65_536
NAMED_ROWS = 3

PadMasked = Literal["refuse", "zeros", "repeat_last"]


class TextPair:
    """The two tensors that Open-Sora trains from: text_t5 [L, D] of one length, and text_clip [C].

    `t5` and `clip` name the stored tensors that give them. Open-Sora stacks a batch, so all
    sequences must have one length. A dataset that stores all positions has it. For one that stores
    real ones only, `pad_masked` says what follows them up to max_length: zeros, or the last vector
    again and again. Without a choice (`refuse`) such a dataset is an InputError.
    """

    def __init__(
        self, dataset: EmbeddingDataset, t5: str, clip: str, pad_masked: PadMasked = "refuse"
    ) -> None:
        self.t5, self.clip, self.pad_masked = t5, clip, pad_masked
        tensors = dataset.tensors
        for name, per, wanted in ((t5, "token", "text_t5"), (clip, "caption", "text_clip")):
            fitting = [key for key, tensor in sorted(tensors.items()) if tensor.per == per]
            if name not in fitting:
                raise InputError(
                    f"{name!r} cannot give {wanted}, a vector per {per}: the dataset has "
                    f"{sorted(tensors)}, of which {fitting or 'none'} would do. Name it, or "
                    "precompute with both."
                )
        if pad_masked not in ("refuse", "zeros", "repeat_last"):
            raise InputError(f"pad_masked is {pad_masked!r}: expected refuse, zeros, repeat_last.")
        self.masked = dataset.positions(f"text_{t5}") != "all"
        encoder = dataset.manifest.spec["encoders"][tensors[t5].encoder]
        self._length: int = encoder.get("max_length", 0)
        if self.masked and pad_masked == "refuse":
            raise InputError(
                f"{t5!r} stores real positions only (attention_mask padding, or keep real): its "
                "embeddings have the length of their captions, and Open-Sora stacks only equal "
                "lengths. Precompute with attention_mask none and without keep, which is "
                "Open-Sora's own recipe, or choose pad_masked zeros "
                "or repeat_last, which is not what its model was trained with."
            )

    def of(self, sample: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """text_t5 and text_clip of a sample, or of the null embedding."""
        sequence: torch.Tensor = sample[f"text_{self.t5}"]
        if self.masked and self.pad_masked == "repeat_last":
            if not len(sequence):
                raise InputError(
                    f"sample {sample.get('id', 'null')!r} stores no vector in text_{self.t5} "
                    "(empty: nothing), so there is none to repeat. Choose pad_masked zeros."
                )
            sequence = pad_null(sequence[None], self._length)[0]
        elif self.masked:
            sequence = functional.pad(sequence, (0, 0, 0, self._length - len(sequence)))
        return {"text_t5": sequence, "text_clip": sample[f"text_{self.clip}"]}


class PrecomputedText:
    """What `PrecomputedVideoTextDataset` puts before Open-Sora's class.

    `embeddings`: the dataset's folder, or a list of folders. Those of one fingerprint are one
    dataset; those that differ in the length of their texts are for other buckets. All arguments
    that are not explained here are Open-Sora's own, but memory_efficient must be False.

    `id_column`: the table's column with the ids of the samples. By default it is the one that the
    dataset was made with, and the row number where it was made without; in a table that
    `embed-precompute export` wrote it is `sample_id`.
    `compare`: which text of a row must be the encoded one, else ConflictError. `trainer`: the text
    that Open-Sora would encode, with its fps_max and vmaf. `dataset`: the row's caption with the
    dataset's own normalisation and recipe; for training on other text than Open-Sora's on purpose.
    `on_missing`: rows whose sample has no embedding are dropped, or an InputError.
    `time_compression_ratio`, `spatial_compression_ratio`: of the trainer's autoencoder. With a
    dataset's seq_align they say which length the texts of a bucket have; an InputError names a
    length that no folder has. With `bucket_config`, the trainer's table, that is checked at the
    start for all its buckets, else with the first sample of one. `patch_size` must be 2.
    `verify` is that of `EmbeddingDataset`; `t5`, `clip` and `pad_masked` are those of `TextPair`.
    """

    data: Any
    fps_max: int
    vmaf: bool
    cached_video: bool
    cached_text: bool
    load_original_video: bool
    return_latents_path: bool

    def __init__(
        self,
        *,
        embeddings: AnyPath | Sequence[AnyPath],
        t5: str = "t5",
        clip: str = "clip",
        id_column: str | None = None,
        pad_masked: PadMasked = "refuse",
        compare: Literal["trainer", "dataset"] = "trainer",
        on_missing: Literal["drop", "error"] = "drop",
        bucket_config: Mapping[str, Any] | None = None,
        time_compression_ratio: int = 4,
        spatial_compression_ratio: int = 8,
        patch_size: int = TRAINER_PATCH,
        verify: Literal["never", "rows"] = "never",
        cached_text: bool = True,
        **opensora: Any,
    ) -> None:
        if on_missing not in ("drop", "error"):
            raise InputError(f"on_missing is {on_missing!r}: expected drop or error.")
        if compare not in ("trainer", "dataset"):
            raise InputError(f"compare is {compare!r}: expected trainer or dataset.")
        if opensora.get("memory_efficient"):
            raise InputError(
                "memory_efficient is True: ids and captions of all rows are compared at the start, "
                "so they must be in memory. Set it to False; embeddings are not held there."
            )
        if patch_size != TRAINER_PATCH:
            raise InputError(
                f"patch_size is {patch_size}: with cached text Open-Sora's train.py makes patches "
                f"of {TRAINER_PATCH} x {TRAINER_PATCH}, because it does not pass patch_size to "
                "prepare_ids. Train with cached_text False."
            )
        paths = [embeddings] if isinstance(embeddings, (str, os.PathLike)) else list(embeddings)
        self._lengths = TextLengths(
            paths,
            verify,
            t5,
            time_compression_ratio=time_compression_ratio,
            spatial_compression_ratio=spatial_compression_ratio,
        )
        self._pair = TextPair(self._lengths.first, t5, clip, pad_masked)
        if patch := made_for_patch(self._lengths.first.roots[0], t5):
            self._warn(NO_CACHED_TEXT % patch)
        if bucket_config is not None:
            self._lengths.require_all(bucket_config)
        opensora["cached_text"] = cached_text
        super().__init__(**opensora)
        datasets = self._lengths.datasets
        plans = [[finished_plan(root) for root in each.roots] for each in datasets.values()]
        column = id_column or _id_column(self.data, str(opensora.get("data_path")), plans)
        kept, samples = self._join(column, on_missing)
        self._samples = {length: found[kept] for length, found in samples.items()}
        """For each length, the sample of each row; -1 where that folder has none."""
        self.num_dropped = len(self.data) - len(kept)
        """Rows of the table that have no embedding."""
        if self.num_dropped:
            self.data = self.data.iloc[kept].reset_index(drop=True)
        self._check_texts(kept, compare, plans[0][0])

    def _join(self, column: str | None, on_missing: str) -> tuple[Array, dict[int, Array]]:
        """The rows that have an embedding, and for each length the sample of every row or -1."""
        ids = list(map(str, range(len(self.data))))
        if column is not None:
            _require_column(self.data, column, "it names the samples")
            ids = list(map(str, self.data[column].tolist()))
            for value in self.data[column].tolist():  # pandas reads integers with a gap as floats
                if not isinstance(value, (str, numbers.Integral)):  # numpy's integers too
                    raise InputError(
                        f"column {column!r} holds {value!r} ({type(value).__name__}): expected "
                        "strings or integers without a null."
                    )
        samples = {length: np.full(len(ids), -1) for length in self._lengths.datasets}
        failed = np.zeros(len(ids), bool)  # rows with a sample that has another status than ok
        for length, dataset in self._lengths.datasets.items():
            for row, sample_id in enumerate(ids):
                try:
                    samples[length][row] = dataset.index_of(sample_id)
                except SampleLookupError as error:
                    failed[row] |= error.has_sample
        has_one = np.any([found >= 0 for found in samples.values()], axis=0)
        kept = np.flatnonzero(has_one)
        if len(kept) < len(ids):
            why = ""
            try:
                self._lengths.first.index_of(ids[int(np.argmin(has_one))])
            except SampleLookupError as error:
                why = str(error)
            by = "row number" if column is None else f"column {column!r}"
            missing, total = len(ids) - len(kept), len(ids)
            said = f"{missing:,} of {total:,} rows have no embedding by their {by}"
            not_ok = int((failed & ~has_one).sum())
            if 0 < not_ok < missing:  # of one kind, `why` says it
                said += f" ({not_ok:,} failed, {missing - not_ok:,} are not in the dataset)"
            said += f": {why}"
            if on_missing == "error" or not len(kept):
                raise InputError(
                    f"{said} Remove them from the table, precompute them, or set "
                    "dataset.id_column; for several captions a row, use the table of an export."
                )
            self._warn(f"{said} They are left out.")
        return kept, samples

    def _warn(self, said: str) -> None:
        if DistContext.of_training().is_main:  # the other ranks would say the same
            log.warning("%s", said)

    def _check_texts(self, kept: Array, compare: str, plan: Plan) -> None:
        """ConflictError unless each row's text is the one that was encoded.

        64 bits of the sha256 are compared: enough to find a difference, and 8 bytes a sample.
        """
        found = np.fromiter(
            (
                int(hashlib.sha256(text.encode()).hexdigest()[:16], 16)
                for text in self._texts(compare, plan)
            ),
            np.uint64,
            len(kept),
        )
        of_wrong: dict[int, tuple[EmbeddingDataset, int]] = {}
        for length, dataset in self._lengths.datasets.items():
            samples = self._samples[length]
            digests = (d for part in dataset.columns("text_sha256") for d in part["text_sha256"])
            stored = np.fromiter((int(d[:16], 16) for d in digests), np.uint64, len(dataset))
            rows = np.flatnonzero(samples >= 0)
            for row in rows[stored[samples[rows]] != found[rows]].tolist():
                of_wrong.setdefault(row, (dataset, int(samples[row])))
        if not of_wrong:
            return
        lines, named = [], sorted(of_wrong)[:NAMED_ROWS]
        for row, text in enumerate(self._texts(compare, plan)):
            if row in named:
                dataset, sample = of_wrong[row]
                lines.append(
                    f"row {kept[row]}, sample {dataset.ids[sample]!r}: the {compare} makes "
                    f"{text!r:.200}, encoded was {dataset.encoded_text(sample)!r:.200}"
                )
        settings = recipe_of(plan.spec["captions"]["recipe"]).trainer_settings()
        raise ConflictError(
            f"{len(of_wrong):,} of {len(kept):,} rows have another text than their sample:\n  "
            + "\n  ".join(lines)
            + "\nUse the captions that were encoded, with their ids in dataset.id_column"
            + (f", and {', '.join(settings)} in dataset" if settings else "")
            + ". If only Open-Sora's suffix differs, and on purpose, set compare='dataset'."
        )

    def _texts(self, compare: str, plan: Plan) -> Iterator[str]:
        """The text of each row that is compared with the encoded one."""
        captions = plan.spec["captions"]
        if compare == "trainer":
            has_fps = FPS in self.data.columns and self.fps_max < OPENSORA_NO_FPS
            has_motion = self.vmaf and MOTION in self.data.columns
            recipe: Any = OpenSoraRecipe(
                fps_column=FPS if has_fps else None,
                fps_max=self.fps_max,
                fps_format="int",  # a float is written as a float anyway
                motion_column=MOTION if has_motion else None,
            )
            normalize, text_column = None, TEXT
        else:
            recipe = recipe_of(captions["recipe"])
            normalize, text_column = make_normalizer(captions["normalize"]), TEXT
            if isinstance(plan.inputs.text_column, str):  # of several, an export makes one
                text_column = plan.inputs.text_column
        columns = [text_column, *recipe.columns]
        for name in columns:
            _require_column(self.data, name, f"the text of the {compare} is made of it")
        for first in range(0, len(self.data), ROWS_AT_ONCE):
            part = self.data.iloc[first : first + ROWS_AT_ONCE]
            for caption, *row in zip(*(part[name].tolist() for name in columns), strict=True):
                text = normalize(caption) if normalize and isinstance(caption, str) else caption
                yield str(recipe.render(text, row))

    def get_conditioning_latents(self, index: int, length: int | None = None) -> dict[str, Any]:
        """What Open-Sora's method of this name gives, with the text from the shards.

        `length`: of the text, where there are datasets of several.
        """
        row = self.data.iloc[index]
        sample: dict[str, Any] = {}
        if self.cached_video:
            sample["video_latents"] = self.get_latents(row["latents_path"])  # type: ignore[attr-defined]
        if self.cached_text:
            length = next(iter(self._samples)) if length is None else length
            dataset, at = self._lengths.datasets[length], int(self._samples[length][index])
            if at < 0:
                has = [str(each) for each, found in self._samples.items() if found[index] >= 0]
                raise InputError(
                    f"row {index} has no embedding among the texts of {length} vectors "
                    f"({', '.join(map(str, dataset.roots))}), only among those of "
                    f"{', '.join(has)}: precompute it for this bucket too."
                )
            sample |= self._pair.of(dataset[at])
        if self.return_latents_path:
            sample["latents_path"] = row["latents_path"]
            sample["text_t5_path"] = sample["text_clip_path"] = ""  # there is no file
        return sample

    def getitem(self, index: str) -> dict[str, Any] | None:
        """Sample `row-frames-height-width`; None for an unreadable video, which the collate skips.

        Open-Sora's own method turns every error into None. An embedding that cannot be read is not
        skipped: its error names the shard and ends the training.
        """
        sample: dict[str, Any] = {}
        if self.load_original_video:
            video_text: Any = super(opensora_class(), self)  # above CachedVideoTextDataset
            loaded = video_text.getitem(index)
            if loaded is None:
                return None
            sample.update(loaded)
        row, frames, height, width = map(int, index.split("-"))
        length = self._lengths.of(Bucket(frames, height, width))
        sample.update(self.get_conditioning_latents(row, length))
        return sample


def _id_column(data: Any, data_path: str, datasets: Sequence[Sequence[Plan]]) -> str | None:
    """The column that names the samples, None: they are row numbers.

    `datasets`: the plans of each length's folders.
    """
    if SAMPLE_ID in data.columns and (Path(data_path).parent / DONE_FILE).is_file():
        return SAMPLE_ID
    columns = {plan.inputs.id_column for plans in datasets for plan in plans}
    if len(columns) > 1 or (None in columns and any(len(plans) > 1 for plans in datasets)):
        raise InputError(
            f"the folders were made with the id columns {columns} (None: row numbers): no column "
            "names the samples of all of them. Set dataset.id_column, or train from one folder."
        )
    column = columns.pop()
    for plan, *_ in datasets if column is None else ():
        if (rows := sum(file.rows for file in plan.inputs.files)) != len(data):
            raise InputError(
                f"the samples are named by the row numbers of a table of {rows:,} rows, and this "
                f"one has {len(data):,}. Read the table that was encoded, or set dataset.id_column."
            )
    return column


def _require_column(data: Any, column: str, why: str) -> None:
    if column not in data.columns:
        raise InputError(
            f"the table has no column {column!r}, and {why}; it has "
            f"{', '.join(map(str, data.columns))}. Set dataset.id_column or dataset.compare, or "
            "write a table with `embed-precompute export DIR OUT --format opensora --table-only`."
        )


def opensora_class() -> Any:
    """Open-Sora's `CachedVideoTextDataset`; InputError where Open-Sora is not installed."""
    try:
        return importlib.import_module("opensora.datasets.datasets").CachedVideoTextDataset
    except ModuleNotFoundError as error:
        raise InputError(
            f"{CLASS_NAME} needs Open-Sora v2 ({error}). Install it (pip install -e . in a clone "
            "of github.com/hpcaitech/Open-Sora), or read the embeddings with EmbeddingDataset."
        ) from error


def register(name: str = REGISTERED_NAME) -> Any:
    """Make the class, once, and put it in Open-Sora's registry DATASETS under `name`."""
    made = globals().get(CLASS_NAME)
    if made is None:
        # In this module's namespace, so that a DataLoader can pickle a dataset into its workers.
        made = type(CLASS_NAME, (PrecomputedText, opensora_class()), {"__module__": __name__})
        globals()[CLASS_NAME] = made
    registry = importlib.import_module("opensora.registry").DATASETS
    if registry.get(name) is not made:
        registry.register_module(name=name, module=made)
    return made


def __getattr__(name: str) -> Any:
    if name == CLASS_NAME:
        return register()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


if "opensora" in sys.modules:  # its trainer imports this module when it reads its configuration
    register()
