"""A user's videos and their embeddings in one data set, joined by id.

A sample of several captions (`v#0`, `v#1`, or `v#short`, `v#long`) belongs to the video `v`. Each
epoch takes the next of a video's captions, from a start that follows from the seed: after as many
epochs as it has captions, each was used once.

Costs: at the start one pass over the ids of all embeddings, 1 to 2 us each. Afterwards 32 bytes a
video, which is also what a pickle holds.
"""

from __future__ import annotations

import logging
import numbers
from array import array
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
import xxhash
from torch.utils.data import Dataset

from embed_precompute.documents import digest_of
from embed_precompute.errors import InputError
from embed_precompute.store.index import Array
from embed_precompute.train.dataset import EmbeddingDataset, SampleLookupError

log = logging.getLogger(__name__)
NAMED = 3


class JoinedDataset(Dataset[dict[str, Any]]):
    """Each of `videos` with the embeddings of its caption: {**video, "id": str, "text_t5": ...}.

    `videos` is a map-style data set of dicts, a list of dicts, or a list of ids alone. `on` is
    where the ids of the videos are: a key of the dicts of a list, or the ids themselves, one for
    each video, such as a column of the table that the videos are loaded from. "id" of a sample is
    that of the embedding, such as `v#1`.

    Raises InputError at the start, naming ids, where videos have no embedding; with `on_missing`
    "drop" these videos are left out and counted in `num_dropped`. Raises InputError at a video that
    is no dict, that has a key of the embedding's too, or another id than `on` gives for it.

    An EmbeddingLoader sets the epoch; for a plain DataLoader call `set_epoch` before each epoch.
    Workers that live for all epochs see it too. A loader's state knows the dataset by
    `fingerprint` and `samples_digest`.
    """

    def __init__(
        self,
        videos: Dataset[Any] | Sequence[Any],
        embeddings: EmbeddingDataset,
        on: str | Sequence[str | int] = "id",
        *,
        seed: int = 0,
        on_missing: Literal["error", "drop"] = "error",
    ) -> None:
        if on_missing not in ("error", "drop"):
            raise InputError(f"on_missing is {on_missing!r}: expected error or drop.")
        self.videos, self.embeddings, self._seed = videos, embeddings, int(seed)
        ids, self._on = _ids_of(videos, on)
        self._ids_alone = isinstance(on, str) and self._on is None
        number: dict[str, int] = {}
        """Each id, numbered: several videos may have one."""
        own = np.fromiter((number.setdefault(each, len(number)) for each in ids), np.int64)
        starts, samples = _captions_of(number, embeddings)
        counts = np.diff(starts)[own]
        kept, missing = np.flatnonzero(counts), np.flatnonzero(counts == 0)
        self.num_dropped = len(missing)
        """Videos without an embedding."""
        if len(missing):
            why = "; ".join(_why(embeddings, ids[k]) for k in missing[:NAMED].tolist())
            said = f"{len(missing):,} of {len(ids):,} videos have no embedding: {why}"
            said += f"; and {len(missing) - NAMED:,} more" if len(missing) > NAMED else ""
            if on_missing == "error" or not len(kept):
                raise InputError(f"{said}. Leave them out, or set on_missing='drop'.")
            log.warning("%s. They are left out.", said)
        self._videos, self._counts, self._samples = kept, counts[kept], samples
        self._starts = starts[:-1][own[kept]]
        # In shared memory: workers that live for all epochs must see a later set_epoch.
        self._epoch = _shared(torch.zeros(1, dtype=torch.int64))

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._epoch = _shared(self._epoch)  # in a worker it is already

    @property
    def fingerprint(self) -> str:
        """That of the embeddings."""
        return self.embeddings.fingerprint

    @property
    def samples_digest(self) -> str:
        """Says which captions every index has in every epoch: see EmbeddingDataset."""
        arrays = (self._starts, self._counts, self._samples)
        digests = [xxhash.xxh3_128_hexdigest(np.ascontiguousarray(each).data) for each in arrays]
        return digest_of([self.embeddings.samples_digest, self._seed, *digests])

    def set_epoch(self, epoch: int) -> None:
        """Which of its captions a video has from now on; any number, in this and all workers."""
        self._epoch[0] = epoch

    def caption_of(self, i: int) -> int:
        """The index in `embeddings` of the caption that video `i` has in this epoch."""
        start, count = int(self._starts[i]), int(self._counts[i])
        turn = 0
        if count > 1:
            first = xxhash.xxh3_64_intdigest(f"caption {self._seed}/{i}".encode())
            turn = (first + int(self._epoch[0])) % count
        return int(self._samples[start + turn])

    def __len__(self) -> int:
        return len(self._videos)

    def __repr__(self) -> str:
        captions = int(self._counts.sum())
        return (
            f"JoinedDataset({len(self):,} videos of {type(self.videos).__name__}, {captions:,} "
            f"captions of {self.embeddings!r})"
        )

    def __getitem__(self, i: int) -> dict[str, Any]:
        """Video `i`, counted without those that were left out, and its embeddings."""
        i = range(len(self))[i]  # IndexError where it is out of range; below 0 from the end
        at = int(self._videos[i])
        video, sample = self.videos[at], self.embeddings[self.caption_of(i)]
        if self._ids_alone:
            return sample
        if not isinstance(video, Mapping):
            raise InputError(
                f"video {at} is a {type(video).__name__}: expected a dict, to which the embeddings "
                "are added."
            )
        found = str(video.get(self._on or "id", sample["id"]))
        if found not in (sample["id"], sample["id"].rpartition("#")[0]):
            raise InputError(
                f"video {at} has the id {found!r}, but is joined to the sample {sample['id']!r}: "
                "expected the videos in the order of the ids in `on`, and no other key 'id'."
            )
        clash = (video.keys() & sample.keys()) - {"id" if self._on in (None, "id") else ""}
        if clash:
            raise InputError(
                f"video {at} and its embedding both have {sorted(clash)}: rename these keys of the "
                "videos."
            )
        return {**video, **sample}


def _shared(values: torch.Tensor) -> torch.Tensor:
    values.share_memory_()  # type: ignore[no-untyped-call]
    return values


def _ids_of(videos: Any, on: str | Sequence[str | int]) -> tuple[list[str], str | None]:
    """The id of each video, and the key that it has in the videos' dicts, if one was given."""
    key = None
    if not isinstance(on, str):
        ids: list[Any] = list(on)
        if len(ids) != len(videos):
            raise InputError(f"`on` has {len(ids):,} ids for {len(videos):,} videos.")
    elif not isinstance(videos, Sequence):
        raise InputError(
            f"on={on!r} would load every {type(videos).__name__} video for its id. Give the ids, "
            "one for each video, such as a column of the table: on=table['id']."
        )
    elif any(isinstance(video, Mapping) for video in videos[:1]):
        key, ids = on, []
        for at, video in enumerate(videos):
            if on not in video:
                raise InputError(f"video {at} has no key {on!r}, only {', '.join(video)}: set on=.")
            ids.append(video[on])
    else:
        ids = list(videos)
    if not ids:
        raise InputError("there are no videos: expected at least one.")
    for at, value in enumerate(ids):
        if not isinstance(value, (str, numbers.Integral)) or isinstance(value, bool):
            raise InputError(
                f"the id of video {at} is {value!r} ({type(value).__name__}): expected strings or "
                "integers."
            )
    return list(map(str, ids)), key


def _captions_of(number: Mapping[str, int], embeddings: EmbeddingDataset) -> tuple[Array, Array]:
    """For video k of `number` its embeddings are samples[starts[k] : starts[k + 1]].

    They are the sample with the video's id, or else the captions of the row with this id.
    """
    exact = np.full(len(number), -1, np.int64)
    videos, samples = array("q"), array("q")
    several, seen = len(embeddings.roots) > 1, set()
    ids = ((folder, each) for folder in embeddings._folders for each in folder.ids())
    for i, (folder, sample_id) in enumerate(ids):
        k = number.get(sample_id)
        if k is not None:
            exact[k] = i if exact[k] < 0 else exact[k]  # the first of several folders
            continue
        video, mark, name = sample_id.rpartition("#")
        k = number.get(video) if mark else None
        if k is None or sample_id in seen or not folder.is_caption_of(video, name):
            continue
        if several:
            seen.add(sample_id)
        videos.append(k)
        samples.append(i)
    of_video, found = np.array(videos, np.int64), np.array(samples, np.int64)
    other = exact[of_video] < 0
    has_one = np.flatnonzero(exact >= 0)
    of_video = np.concatenate([has_one, of_video[other]])
    found = np.concatenate([exact[has_one], found[other]])
    order = np.argsort(of_video, kind="stable")
    counts = np.bincount(of_video, minlength=len(number))
    return np.concatenate([[0], np.cumsum(counts)]), found[order]


def _why(embeddings: EmbeddingDataset, sample_id: str) -> str:
    try:
        embeddings.index_of(sample_id)
    except SampleLookupError as error:
        return str(error).rstrip(".")
    return sample_id
