"""Open-Sora v2's cached-text dataset class, reading our shards directly: no second copy.

`PrecomputedVideoTextDataset` is Open-Sora's own `CachedVideoTextDataset` in all but where
`text_t5` and `text_clip` come from. They are, bit for bit, what an export would have stored. A row
without an embedding is dropped and counted, or refused, before the sampler sees it. An embedding
that cannot be read ends the training with its message and is never replaced by zeros.

At the start the text that the trainer would encode for each row is compared with the text that was
encoded, so neither a wrong id column nor changed captions can pair a clip with the wrong text. That
takes about 30 us a row; afterwards a sample is one copy out of the mapped shard.

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
from embed_precompute.errors import ConflictError, InputError
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
    sequences must have one length. A dataset with attention_mask none has it. One with `padding`
    stores real tokens only; `pad_masked` says what follows them up to max_length: zeros, or the
    last vector again and again. Without a choice (`refuse`) such a dataset is an InputError.
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
        self.masked = dataset.is_masked(f"text_{t5}")
        encoder = dataset.manifest.spec["encoders"][tensors[t5].encoder]
        self._length: int = encoder.get("max_length", 0)
        if self.masked and pad_masked == "refuse":
            raise InputError(
                f"{t5!r} was made with attention_mask padding: its embeddings have the length of "
                "their captions, and Open-Sora stacks only equal lengths. Precompute with "
                "attention_mask none, which is Open-Sora's own recipe, or choose pad_masked zeros "
                "or repeat_last, which is not what its model was trained with."
            )

    def of(self, sample: Mapping[str, Any]) -> dict[str, torch.Tensor]:
        """text_t5 and text_clip of a sample, or of the null embedding."""
        sequence: torch.Tensor = sample[f"text_{self.t5}"]
        if self.masked and self.pad_masked == "repeat_last":
            sequence = pad_null(sequence[None], self._length)[0]
        elif self.masked:
            sequence = functional.pad(sequence, (0, 0, 0, self._length - len(sequence)))
        return {"text_t5": sequence, "text_clip": sample[f"text_{self.clip}"]}


class PrecomputedText:
    """What `PrecomputedVideoTextDataset` puts before Open-Sora's class.

    `embeddings`: the dataset's folder, or a list of folders with one fingerprint. All arguments
    that are not explained here are Open-Sora's own, but memory_efficient must be False.

    `id_column`: the table's column with the ids of the samples. By default it is the one that the
    dataset was made with, and the row number where it was made without; in a table that
    `embed-precompute export` wrote it is `sample_id`.
    `compare`: which text of a row must be the encoded one, else ConflictError. `trainer`: the text
    that Open-Sora would encode, with its fps_max and vmaf. `dataset`: the row's caption with the
    dataset's own normalisation and recipe; for training on other text than Open-Sora's on purpose.
    `on_missing`: rows whose sample has no embedding are dropped, or an InputError.
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
        opensora["cached_text"] = cached_text
        super().__init__(**opensora)
        self._embeddings = EmbeddingDataset(embeddings, verify)
        self._pair = TextPair(self._embeddings, t5, clip, pad_masked)
        plans = [finished_plan(root) for root in self._embeddings.roots]
        column = id_column or _id_column(self.data, str(opensora.get("data_path")), plans)
        kept, samples = self._join(column, on_missing)
        self._samples = np.array(samples, np.int64)
        """The sample of each row."""
        self.num_dropped = len(self.data) - len(kept)
        """Rows of the table that have no embedding."""
        if self.num_dropped:
            self.data = self.data.iloc[kept].reset_index(drop=True)
        self._check_texts(kept, compare, plans[0])

    def _join(self, column: str | None, on_missing: str) -> tuple[list[int], list[int]]:
        """The rows that have an embedding, and the sample of each of them."""
        ids: Iterator[str] = map(str, range(len(self.data)))
        if column is not None:
            _require_column(self.data, column, "it names the samples")
            ids = map(str, self.data[column].tolist())
            for value in self.data[column].tolist():  # pandas reads integers with a gap as floats
                if not isinstance(value, (str, numbers.Integral)):  # numpy's integers too
                    raise InputError(
                        f"column {column!r} holds {value!r} ({type(value).__name__}): expected "
                        "strings or integers without a null."
                    )
        kept, samples, why = [], [], ""
        for row, sample_id in enumerate(ids):
            try:
                samples.append(self._embeddings.index_of(sample_id))
                kept.append(row)
            except SampleLookupError as error:
                why = why or str(error)
        if why:
            by = "row number" if column is None else f"column {column!r}"
            missing, total = len(self.data) - len(kept), len(self.data)
            said = f"{missing:,} of {total:,} rows have no embedding by their {by}: {why}"
            if on_missing == "error" or not kept:
                raise InputError(
                    f"{said} Remove them from the table, precompute them, or set "
                    "dataset.id_column; for several captions a row, use the table of an export."
                )
            log.warning("%s They are left out.", said)
        return kept, samples

    def _check_texts(self, kept: list[int], compare: str, plan: Plan) -> None:
        """ConflictError unless each row's text is the one that was encoded.

        64 bits of the sha256 are compared: enough to find a difference, and 8 bytes a sample.
        """
        digests = (
            d for part in self._embeddings.columns("text_sha256") for d in part["text_sha256"]
        )
        stored = np.fromiter((int(d[:16], 16) for d in digests), np.uint64, len(self._embeddings))
        found = np.fromiter(
            (
                int(hashlib.sha256(text.encode()).hexdigest()[:16], 16)
                for text in self._texts(compare, plan)
            ),
            np.uint64,
            len(kept),
        )
        wrong = np.flatnonzero(stored[self._samples] != found)
        if not len(wrong):
            return
        lines = []
        for row, text in enumerate(self._texts(compare, plan)):
            if row in wrong[:NAMED_ROWS]:
                sample_id = self._embeddings[int(self._samples[row])]["id"]
                encoded = self._embeddings.encoded_text(int(self._samples[row]))
                lines.append(
                    f"row {kept[row]}, sample {sample_id!r}: the {compare} makes {text!r:.200}, "
                    f"encoded was {encoded!r:.200}"
                )
        settings = recipe_of(plan.spec["captions"]["recipe"]).trainer_settings()
        raise ConflictError(
            f"{len(wrong):,} of {len(kept):,} rows have another text than their sample:\n  "
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

    def get_conditioning_latents(self, index: int) -> dict[str, Any]:
        """What Open-Sora's method of this name gives, with the text from the shards."""
        row = self.data.iloc[index]
        sample: dict[str, Any] = {}
        if self.cached_video:
            sample["video_latents"] = self.get_latents(row["latents_path"])  # type: ignore[attr-defined]
        if self.cached_text:
            sample |= self._pair.of(self._embeddings[int(self._samples[index])])
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
        sample.update(self.get_conditioning_latents(int(index.split("-")[0])))
        return sample


def _id_column(data: Any, data_path: str, plans: Sequence[Plan]) -> str | None:
    """The column that names the samples, None: they are row numbers."""
    if SAMPLE_ID in data.columns and (Path(data_path).parent / DONE_FILE).is_file():
        return SAMPLE_ID
    columns = {plan.inputs.id_column for plan in plans}
    if len(columns) > 1 or (len(plans) > 1 and None in columns):
        raise InputError(
            f"the folders were made with the id columns {columns} (None: row numbers): no column "
            "names the samples of all of them. Set dataset.id_column, or train from one folder."
        )
    column = columns.pop()
    rows = sum(file.rows for file in plans[0].inputs.files)
    if column is None and rows != len(data):
        raise InputError(
            f"the samples are named by the row numbers of a table of {rows:,} rows, and this one "
            f"has {len(data):,}. Read the table that was encoded, or set dataset.id_column."
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
