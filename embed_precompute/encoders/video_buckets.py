"""How many tokens a video bucket adds to the sequence: Open-Sora's bucket table as arithmetic.

Guarantees: the pixel sizes are those that Open-Sora's bucket sampler makes for a resolution name,
and the token counts those of its latents after patching. A bucket that its trainer cannot patch is
refused, one that it never draws from is left out.

Facts from hpcaitech/Open-Sora: opensora/datasets/aspect.py (sizes), datasets/bucket.py (what is
drawn), utils/sampling.py (patches), and get_latent_size of its two autoencoders.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass

from embed_precompute.errors import InputError, require

# Ratios of width to height. The sampler uses each, and the same turned by 90 degrees.
ASPECT_RATIOS = (
    (2.39, 1.0), (2.0, 1.0), (16.0, 9.0), (1.85, 1.0), (9.0, 16.0), (5.0, 8.0), (3.0, 2.0),
    (4.0, 3.0), (1.0, 1.0),
)  # fmt: skip
RESOLUTION = re.compile(r"(\d+)(px|p)(?:_(?:(max)|ar(\d+(?:\.\d+)?):(\d+(?:\.\d+)?)))?")

Ratio = tuple[float, float]
"""(width, height), in any unit."""
Size = tuple[int, int]
"""(height, width) in pixels."""
Draw = tuple[float | tuple[float, float], int]
"""Open-Sora's bucket_config for a number of frames: one probability or two, and the batch size."""


@dataclass(frozen=True, order=True)
class Bucket:
    """The shape of the clips in one batch of the trainer."""

    frames: int
    height: int
    width: int
    """Width in pixels, as `height`."""
    resolution: str = ""
    """The resolution's name in the bucket table, if the bucket comes from a table."""

    def __str__(self) -> str:
        return f"{self.resolution} {self.frames}x{self.height}x{self.width}".strip()


@dataclass(frozen=True)
class VideoTokensConfig:
    """How many tokens the video adds to the sequence, from the buckets of the trainer's clips."""

    buckets: tuple[tuple[int, int, int], ...] | None = None
    """[frames, height, width] of every bucket, in pixels; this or bucket_config."""
    bucket_config: dict[str, dict[int, Draw]] | None = None
    """Open-Sora's table: resolution (256px, 720p) -> frames -> [probability, batch size]."""
    time_compression_ratio: int = 4
    """Frames per latent frame, as in the trainer's autoencoder."""
    spatial_compression_ratio: int = 8
    """Pixels per latent, in height and width: the trainer's ae_spatial_compression / patch_size."""
    patch_size: int = 2
    """Latents per token, in height and width, as the trainer's patch_size."""

    def __post_init__(self) -> None:
        for name in ("time_compression_ratio", "spatial_compression_ratio", "patch_size"):
            value = getattr(self, name)
            require(value >= 1, f"{name} is {value}: expected 1 or more.")
        require(
            (self.buckets is None) != (self.bucket_config is None),
            "buckets or bucket_config is needed, and the other null.",
        )
        buckets = self.all_buckets()
        given = "buckets" if self.buckets is not None else "bucket_config"
        require(bool(buckets), f"{given} has no bucket that a clip could be in.")
        for bucket in buckets:
            require(
                min(bucket.frames, bucket.height, bucket.width) >= 1,
                f"bucket {bucket}: expected frames, height and width of 1 or more.",
            )
        self.by_tokens()

    def all_buckets(self) -> list[Bucket]:
        """All buckets, in the order given; of a bucket_config, those that the sampler can draw."""
        if self.buckets is not None:
            return [Bucket(*bucket) for bucket in self.buckets]
        multiple = self.spatial_compression_ratio * self.patch_size
        return [
            Bucket(frames, height, width, resolution)
            for resolution, by_frames in (self.bucket_config or {}).items()
            for height, width in resolution_sizes(resolution, multiple)
            for frames, draw in sorted(by_frames.items())
            if _is_drawn(draw)
        ]

    def by_tokens(self) -> dict[int, list[Bucket]]:
        """The buckets by the number of tokens that they add, fewest first."""
        found: dict[int, list[Bucket]] = {}
        for bucket in self.all_buckets():
            found.setdefault(self.tokens(bucket), []).append(bucket)
        return dict(sorted(found.items()))

    def tokens(self, bucket: Bucket) -> int:
        """Latent frames x (height / patch) x (width / patch).

        A side of n pixels, or n frames, makes ceil(n / ratio) latents. Raises InputError if the
        latents do not divide into patches.
        """
        ratio, patch = self.spatial_compression_ratio, self.patch_size
        frames = -(-bucket.frames // self.time_compression_ratio)
        height, width = -(-bucket.height // ratio), -(-bucket.width // ratio)
        if height % patch or width % patch:
            raise InputError(
                f"bucket {bucket} has latents of {height} x {width} with a "
                f"spatial_compression_ratio of {ratio}: they do not divide into patches of {patch} "
                f"x {patch}. Use sizes in pixels that are multiples of {ratio * patch}."
            )
        return frames * (height // patch) * (width // patch)


def resolution_sizes(resolution: str, size_multiple: int) -> list[Size]:
    """The sizes of a resolution. "256px": an area of about 256 x 256 pixels; "720p": 720 x 1280.

    "256px_max" is the size with most pixels, "256px_ar16:9" the size of that ratio.
    """
    match = RESOLUTION.fullmatch(resolution)
    if match is None or int(match[1]) == 0:
        raise InputError(
            f"bucket_config: {resolution!r} is no resolution. Expected a name such as 256px, 720p, "
            "256px_max or 256px_ar16:9."
        )
    side = int(match[1])
    pixels = side * side if match[2] == "px" else int(side * side / 9 * 16)
    by_ratio = _sizes_by_ratio(pixels, size_multiple, resolution)
    if match[3]:
        return [max(by_ratio.values(), key=math.prod)]
    if match[4]:
        ratio = (float(match[4]), float(match[5]))
        if ratio not in by_ratio:
            known = ", ".join(f"{w:g}:{h:g}" for w, h in sorted(by_ratio))
            raise InputError(
                f"bucket_config: {resolution!r} has a ratio of {ratio[0]:g}:{ratio[1]:g}; expected "
                f"one of {known}."
            )
        return [by_ratio[ratio]]
    return sorted(set(by_ratio.values()))


def _sizes_by_ratio(pixels: int, multiple: int, resolution: str) -> dict[Ratio, Size]:
    """Ratio -> size: the listed ratios, then their sizes turned by 90 degrees. If both give a size
    for one ratio, the turned size is used."""
    upright: dict[Ratio, Size] = {}
    for ratio in ASPECT_RATIOS:
        size = _nearest_size(pixels, ratio, multiple)
        if min(size) <= 0:
            raise InputError(
                f"bucket_config: {resolution!r} is too small for sizes that are multiples of "
                f"{multiple} pixels (spatial_compression_ratio x patch_size)."
            )
        if size not in upright.values():
            upright[ratio] = size
    return upright | {(down, across): (w, h) for (across, down), (h, w) in upright.items()}


def _nearest_size(pixels: int, ratio: Ratio, multiple: int) -> Size:
    """The size rounded down to the multiple, or one step from it if that is nearer to `pixels`.

    Floats in this order of operations: another order could round another way.
    """
    width = int(math.sqrt(pixels * (ratio[0] / ratio[1])) // multiple) * multiple
    if width == 0:
        return 0, 0
    height = int((pixels / width) // multiple) * multiple
    steps = ((0, 0), (-multiple, 0), (multiple, 0), (0, -multiple), (0, multiple))
    sizes = [(height + down, width + across) for down, across in steps]
    return min(sizes, key=lambda size: abs(math.prod(size) - pixels))


def _is_drawn(draw: Draw) -> bool:
    """Whether the sampler ever draws the bucket; a second probability is that of skipping it."""
    probability = draw[0]
    if isinstance(probability, (tuple, list)):
        return probability[0] > 0 and probability[1] < 1
    return probability > 0
