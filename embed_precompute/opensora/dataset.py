"""Open-Sora v2's cached-text data set class, reading our shards directly: no second copy.

Guarantees: `PrecomputedVideoTextDataset` is Open-Sora's own `CachedVideoTextDataset` in all but the
source of `text_t5` and `text_clip`, which are, bit for bit, what an export would have stored. A row
without an embedding is dropped and counted, or refused, before the sampler sees it; an embedding
that cannot be read ends the training with its message and is never replaced by zeros.
Costs: opening looks up the id of every row (about 20 us each); a sample is one copy out of the
mapped shard. Importing this module imports Open-Sora where it is installed, and registers the class
there; where it is not, nothing happens until the class is asked for.

In Open-Sora's configuration:

    custom_imports = dict(imports=["embed_precompute.opensora.dataset"], allow_failed_imports=False)
    dataset = dict(type="precomputed_video_text", embeddings="out", data_path="table.parquet", ...)
    cached_text = True

Written from opensora/datasets/datasets.py of https://github.com/hpcaitech/Open-Sora (Apache-2.0).
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import numbers
from collections.abc import Sequence
from typing import Any, Literal

from embed_precompute.errors import InputError
from embed_precompute.opensora.text_pair import PadMasked, TextPair
from embed_precompute.train.dataset import AnyPath, EmbeddingDataset, SampleLookupError

log = logging.getLogger(__name__)

REGISTERED_NAME = "precomputed_video_text"
CLASS_NAME = "PrecomputedVideoTextDataset"
ID_COLUMNS = ("sample_id", "id")
"""Columns looked for when `id_column` is not given; `export` writes the first."""

OnMissing = Literal["drop", "error"]


class PrecomputedText:
    """What `PrecomputedVideoTextDataset` puts before Open-Sora's class.

    `embeddings`: the dataset's folder, or a list of folders with one fingerprint. `id_column` of
    the table names the sample: by default `sample_id`, which `embed-precompute export` writes, else
    `id`. `on_missing`: rows whose sample has no embedding are dropped, or an InputError. `verify`
    is as in `EmbeddingDataset`. All other arguments are Open-Sora's own. With memory_efficient the
    ids are not in memory: no row is dropped, and one without an embedding ends the training.
    """

    data: Any
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
        on_missing: OnMissing = "drop",
        verify: Literal["never", "rows"] = "never",
        cached_text: bool = True,
        memory_efficient: bool = False,
        **opensora: Any,
    ) -> None:
        if on_missing not in ("drop", "error"):
            raise InputError(f"on_missing is {on_missing!r}: expected drop or error.")
        opensora |= {"cached_text": cached_text, "memory_efficient": memory_efficient}
        super().__init__(**opensora)
        self._embeddings = EmbeddingDataset(embeddings, verify)
        self._pair = TextPair(self._embeddings.manifest.spec, t5, clip, pad_masked)
        self._id_column = id_column
        self.num_dropped = 0
        """Rows of the table that have no embedding."""
        self._positions: list[int] | None = None
        if not memory_efficient:
            self._positions = self._find_rows(on_missing)

    def _find_rows(self, on_missing: OnMissing) -> list[int]:
        """The embedding of each row; rows without one leave the table."""
        column = self._id_column or next((c for c in ID_COLUMNS if c in self.data.columns), None)
        if column is None or column not in self.data.columns:
            raise InputError(
                f"the table has no column {column or ' or '.join(ID_COLUMNS)!r} with the ids of "
                f"the samples, only {', '.join(map(str, self.data.columns))}. Set "
                "dataset.id_column, or write a table with `embed-precompute export DIR OUT --format"
                " opensora --table-only`."
            )
        self._id_column = column
        positions, why = [], ""
        for sample_id in self.data[column].tolist():
            try:
                positions.append(self._embeddings.index_of(_id_text(sample_id, column)))
            except SampleLookupError as error:
                positions.append(-1)
                why = why or str(error)
        kept = [row for row, position in enumerate(positions) if position >= 0]
        self.num_dropped = len(positions) - len(kept)
        if self.num_dropped:
            said = f"{self.num_dropped:,} of {len(positions):,} rows have no embedding: {why}"
            if on_missing == "error" or not kept:
                raise InputError(f"{said} Take them out of the table, or precompute them.")
            log.warning("%s They are left out.", said)
            self.data = self.data.iloc[kept].reset_index(drop=True)
        return [positions[row] for row in kept]

    def get_conditioning_latents(self, index: int) -> dict[str, Any]:
        """What Open-Sora's method of this name gives, with the text from the shards."""
        row = self.data.iloc[index]
        sample: dict[str, Any] = {}
        if self.cached_video:
            sample["video_latents"] = self.get_latents(row["latents_path"])  # type: ignore[attr-defined]
        if self.cached_text:
            stored = self._embeddings[self._position(index, row)]
            sample["text_t5"] = self._pair.sequence(stored[f"text_{self._pair.t5}"])
            sample["text_clip"] = stored[f"text_{self._pair.clip}"]
        if self.return_latents_path:
            sample["latents_path"] = row["latents_path"]
            sample["text_t5_path"] = sample["text_clip_path"] = ""  # there is no file
        return sample

    def _position(self, index: int, row: Any) -> int:
        if self._positions is not None:
            return self._positions[index]
        column = self._id_column or ID_COLUMNS[0]
        return self._embeddings.index_of(_id_text(row[column], column))

    def getitem(self, index: str) -> dict[str, Any] | None:
        """Sample `row-frames-height-width`; None (left out by the collate) for an unreadable video.

        Open-Sora's own method turns every error into None. An embedding is not skipped here: the
        error names the shard and goes to whoever trains.
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


def _id_text(value: Any, column: str) -> str:
    """An id of the table as a sample id; pandas reads integers with a gap as floats."""
    if isinstance(value, (str, numbers.Integral)):  # numpy's integers too
        return str(value)
    raise InputError(
        f"column {column!r} holds {value!r} ({type(value).__name__}): expected strings or integers "
        "without a null."
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
    """Make the class, once, and put it in Open-Sora's registry DATASETS under `name`; give it."""
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


_found = importlib.util.find_spec("opensora")
# A package with an __init__.py: neither a folder that has the name, nor this file run as a script's
# neighbour.
if _found is not None and _found.origin is not None and _found.submodule_search_locations:
    register()
