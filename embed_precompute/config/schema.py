"""The configuration as frozen dataclasses.

A `Config` that exists is valid by itself: ranges, exclusive fields, names. Making one imports no
torch and touches no file.

`captions`, `encoders` and `output` change bytes: they are in the fingerprint or in the plan.
`runtime` is everything else and must never change a byte.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Annotated, Literal

from embed_precompute.captions.recipes import CaptionsConfig
from embed_precompute.documents import ByKind
from embed_precompute.encoders.families import FAMILIES
from embed_precompute.encoders.families.base import DType, EncoderConfig
from embed_precompute.errors import require
from embed_precompute.store.records import ENCODER_NAME, RESERVED_ENDINGS

AnyEncoder = Annotated[
    EncoderConfig, ByKind(lambda: {kind: family.options for kind, family in FAMILIES.items()})
]
"""What the configuration says about an encoder: the options of its kind."""


@dataclass(frozen=True)
class OutputConfig:
    """Where the dataset goes and how it is stored."""

    path: str = "out"
    """Folder of the dataset, on a file system every rank sees."""
    samples_per_shard: int | Literal["auto"] = "auto"
    """Samples per shard; auto: 1 GiB over the estimated bytes per sample, at most 4,096."""
    dtype: DType = "bfloat16"
    """dtype of the stored embeddings."""
    codec: Literal["raw"] = "raw"
    """How stored tensors are coded; raw: as they are."""

    def __post_init__(self) -> None:
        require(bool(self.path), "path is empty: expected a folder.")
        require(
            "://" not in self.path,
            f"path is {self.path!r}: expected a folder that every rank mounts, not a URI.",
        )
        count = self.samples_per_shard
        require(count == "auto" or count >= 1, f"samples_per_shard is {count}: expected 1 or more.")


MOST_SECONDS = 10**9


@dataclass(frozen=True)
class RuntimeConfig:
    """How the job runs. Nothing here may change a byte of the dataset."""

    device: str = "auto"
    """auto, cpu, cuda or cuda:N; auto takes this rank's GPU when there is one."""
    weights: Literal["resident", "stream", "auto"] = "resident"
    """Where the weights are: all of them on the device; or stream: layer by layer from the
    checkpoint's files, for fused only. auto: stream if they do not fit."""
    self_check: Literal["auto", "always", "never"] = "auto"
    """Whether each rank compares a few captions with transformers' own model before its first unit;
    auto: on a GPU."""
    max_failed_samples: int = 100
    """Samples that may fail (status non_finite) before the run stops with exit 5."""
    on_environment_change: Literal["warn", "refuse"] = "warn"
    """What to do when units, or rows that --reuse copies, were made with other library versions or
    on another device."""
    plan_timeout_s: float = 600.0
    """How long ranks wait for rank 0's plan before they make the same plan themselves."""
    prefetch_units: int = 1
    """Units that are read and tokenised ahead of the encoder."""
    write_queue_mb: float = 1024.0
    """Megabytes of encoded batches that may wait for the writer; one batch always may."""
    progress_interval_s: float = 60.0
    """Seconds between progress lines when the output is not a terminal, and between the points of a
    tracker."""
    tracker: Literal["none", "tensorboard", "wandb"] = "none"
    """Where rank 0 also writes the progress: tensorboard to logs/tensorboard in the output, wandb
    to Weights & Biases. Each needs the package of its name."""
    grace_s: float = 20.0
    """Seconds a rank has after a stop signal to commit its unit; torchrun kills after 30."""

    def __post_init__(self) -> None:
        for name in (
            "max_failed_samples",
            "plan_timeout_s",
            "write_queue_mb",
            "progress_interval_s",
            "grace_s",
        ):
            value = getattr(self, name)
            require(0 <= value <= MOST_SECONDS, f"{name} is {value}: expected 0 to {MOST_SECONDS}.")
        require(
            self.prefetch_units >= 1,
            f"prefetch_units is {self.prefetch_units}: expected 1 or more.",
        )
        known = re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device)
        require(
            known is not None, f"device is {self.device!r}: expected auto, cpu, cuda or cuda:N."
        )


@dataclass(frozen=True)
class Config:
    """A whole job."""

    captions: CaptionsConfig
    """The caption table."""
    encoders: dict[str, AnyEncoder]
    """Encoders by name; each makes one tensor text_<name>."""
    output: OutputConfig = field(default_factory=OutputConfig)
    """The dataset."""
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    """How the job runs."""

    def __post_init__(self) -> None:
        require(bool(self.encoders), "encoders is empty: name at least one, such as t5 or clip.")
        for name in self.encoders:
            require(
                ENCODER_NAME.match(name) is not None,
                f"encoders.{name}: expected a name of lower-case letters, digits and _.",
            )
            require(
                not name.endswith(RESERVED_ENDINGS),
                f"encoders.{name}: the endings {', '.join(RESERVED_ENDINGS)} belong to other "
                "tensors of an encoder. Choose another name.",
            )
