"""Which text length a clip of Open-Sora's trainer has, and the dataset of that length.

With sequence parallelism the trainer pads a text until video and text together divide by its
sp_size. Pads are encoded with the caption, so the length is part of an embedding, and it follows
from the bucket that the sampler has put a clip in. So there is one dataset for each length.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import yaml

from embed_precompute.documents import differing_fields, listed
from embed_precompute.encoders.video_buckets import Bucket, VideoTokensConfig
from embed_precompute.errors import ConflictError, InputError
from embed_precompute.train.dataset import AnyPath, EmbeddingDataset

OF_THE_LENGTH = ("padded_length", "added_tokens", "shapes")
"""What an encoder's specification has only because of its padded length."""
TRAINER_PATCH = 2
"""With cached text Open-Sora's train.py makes patches of this size, whatever its patch_size is."""
NO_CACHED_TEXT = (
    "the dataset was made for a trainer of patch_size %d (encoders.t5.added_tokens.patch_size): "
    "with cached text Open-Sora's train.py makes patches of 2 x 2, so it cannot train from it"
)


class TextLengths:
    """The datasets by the length of their texts, and the length that a bucket needs.

    `paths`: folders; those of one fingerprint are one dataset. `t5` names the tensor that gives
    text_t5, as in TextPair. The ratios are those of the trainer's autoencoder. Raises ConflictError
    for folders that differ in more than the length of their texts, or not in the length.
    """

    def __init__(
        self,
        paths: Sequence[AnyPath],
        verify: Literal["never", "rows"],
        t5: str,
        *,
        time_compression_ratio: int,
        spatial_compression_ratio: int,
    ) -> None:
        opened = [EmbeddingDataset(path) for path in paths] or [EmbeddingDataset([])]
        self.first = first = opened[0]
        """The dataset of the first folder."""
        encoder = first.tensors[t5].encoder if t5 in first.tensors else t5
        alike: dict[str, list[AnyPath]] = {}
        self.datasets: dict[int, EmbeddingDataset] = {}
        for path, dataset in zip(paths, opened, strict=True):
            alike.setdefault(dataset.fingerprint, []).append(path)
        for group in alike.values():
            dataset = EmbeddingDataset(group, verify)
            specs = [copy.deepcopy(each.manifest.spec) for each in (first, dataset)]
            fields = specs[1]["encoders"].get(encoder, {})
            length = int(fields.get("padded_length") or fields.get("max_length", 0))
            for spec in specs if length not in self.datasets else ():
                for name in OF_THE_LENGTH:
                    spec["encoders"].get(encoder, {}).pop(name, None)
            if lines := differing_fields(*specs):
                raise ConflictError(
                    f"{first.roots[0]} and {dataset.roots[0]} hold different embeddings; they "
                    f"differ in\n  {listed(lines)}\nFolders for other buckets differ in the length "
                    "of their texts, and in nothing else."
                )
            self.datasets[length] = dataset
        fields = first.manifest.spec["encoders"].get(encoder, {})
        self._max_length = int(fields.get("max_length", 0))
        self._seq_align = int(fields.get("seq_align", 1))
        side = spatial_compression_ratio * TRAINER_PATCH
        self._video = VideoTokensConfig(
            buckets=((1, side, side),),  # any: only its arithmetic is used
            time_compression_ratio=time_compression_ratio,
            spatial_compression_ratio=spatial_compression_ratio,
            patch_size=TRAINER_PATCH,
        )

    def of(self, bucket: Bucket) -> int:
        """The length of a text in this bucket; InputError where no dataset has it."""
        if self._seq_align == 1:
            return next(iter(self.datasets))
        tokens = self._video.tokens(bucket)
        length = self._max_length + -(tokens + self._max_length) % self._seq_align
        if length not in self.datasets:
            ratios = (self._video.time_compression_ratio, self._video.spatial_compression_ratio)
            raise InputError(
                f"the bucket {bucket} adds {tokens} tokens (time_compression_ratio {ratios[0]}, "
                f"spatial_compression_ratio {ratios[1]}), so with seq_align {self._seq_align} its "
                f"texts have {length} vectors; there are folders of "
                f"{', '.join(map(str, sorted(self.datasets)))}. Precompute the captions with "
                f"encoders.t5.added_tokens {tokens}, and name that folder in dataset.embeddings."
            )
        return length

    def require_all(self, bucket_config: Mapping[str, Any]) -> None:
        """InputError where a bucket of the trainer's table needs a length that is not there."""
        table = {name: dict(frames) for name, frames in bucket_config.items()}
        for bucket in replace(self._video, buckets=None, bucket_config=table).all_buckets():
            self.of(bucket)


def made_for_patch(root: Path, encoder: str) -> int | None:
    """The patch_size that the buckets of a dataset's added_tokens had, if it is none that works.

    From config.yaml, which tells people how the dataset was made: it may be absent.
    """
    try:
        loaded = yaml.safe_load((root / "config.yaml").read_text(encoding="utf-8"))
        patch = loaded["encoders"][encoder]["added_tokens"]["patch_size"]
    except (OSError, ValueError, LookupError, TypeError, yaml.YAMLError):
        return None
    return patch if isinstance(patch, int) and patch != TRAINER_PATCH else None
