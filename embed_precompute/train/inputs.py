"""Model inputs for a diffusion transformer of text and video: patches, position ids, conditions.

Guarantees: `prepare` and `prepare_ids` give what Open-Sora's functions of these names define (img,
img_ids, txt, txt_ids, y_vec), for any batch and any patch size; an embedding that does not fit the
sequence-parallel alignment is refused, never cut or padded. `dropout_condition` drops each sample
by itself and keeps the batch's dtype.
Costs: torch and einops only, no transformers: a training job imports it. A prompt that is repeated
over a batch is a view of one embedding; so are the position ids.

Semantics from hpcaitech/Open-Sora: opensora/utils/sampling.py, opensora/utils/train.py and
scripts/diffusion/train.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch
from einops import rearrange, repeat
from torch import Tensor

from embed_precompute.errors import InputError


class SequenceEmbedder(Protocol):
    """Prompts to [B, L, D], padded until (added_tokens + L) % seq_align == 0: T5."""

    def __call__(self, text: list[str], added_tokens: int = 0, seq_align: int = 1) -> Tensor: ...


class PooledEmbedder(Protocol):
    """Prompts to [B, C]: CLIP."""

    def __call__(self, text: list[str]) -> Tensor: ...


def prepare(
    t5: SequenceEmbedder,
    clip: PooledEmbedder,
    img: Tensor,
    prompt: str | Sequence[str],
    seq_align: int = 1,
    patch_size: int = 2,
) -> dict[str, Tensor]:
    """Encode `prompt` and give the model's inputs for the latents `img` [B, C, T, H, W].

    One prompt is encoded once and repeated over the batch. More prompts than latents repeat the
    latents, in turn, as classifier-free guidance needs. Result as `prepare_ids`, with a batch that
    is the larger of the two; InputError where the one does not divide the other.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    _check_latents(img, patch_size)
    batch = img.shape[0]
    if not prompts or (len(prompts) % batch and len(prompts) != 1):
        raise InputError(
            f"{len(prompts)} prompts for latents of batch {batch}: expected one prompt, or a "
            "multiple of the batch."
        )
    if len(prompts) > batch:
        img = repeat(img, "b ... -> (repeat b) ...", repeat=len(prompts) // batch)
    added_tokens = video_tokens_of(img, patch_size)
    txt = t5(prompts, added_tokens=added_tokens, seq_align=seq_align)
    return prepare_ids(img, txt, clip(prompts), patch_size=patch_size, seq_align=seq_align)


def prepare_ids(
    img: Tensor,
    t5_embedding: Tensor,
    clip_embedding: Tensor,
    *,
    patch_size: int = 2,
    seq_align: int = 1,
) -> dict[str, Tensor]:
    """The model's inputs for latents `img` [B, C, T, H, W] and embeddings [B, L, D] and [B, C].

    An embedding of batch 1 is repeated. With N = T * (H / patch) * (W / patch), all on the device
    and in the dtype of `img`:

    img      [B, N, C * patch * patch]   patches in the order t, h, w; inside one: c, ph, pw
    img_ids  [B, N, 3]                   the patch's t, h, w (whole numbers are exact up to 256 in
                                         bfloat16, 2,048 in float16)
    txt      [B, L, D]
    txt_ids  [B, L, 3]                   zeros: the text encoder holds the positions
    y_vec    [B, C]

    Raises InputError where shapes do not fit, or N + L is no multiple of `seq_align`, the
    trainer's sequence-parallel size.
    """
    _check_latents(img, patch_size)
    batch, _, frames, height, width = img.shape
    _check_embedding("t5_embedding", t5_embedding, 3, batch)
    _check_embedding("clip_embedding", clip_embedding, 2, batch)
    _check_alignment(t5_embedding.shape[1], video_tokens_of(img, patch_size), seq_align)
    txt, y_vec = (
        _over_batch(embedding.to(img.device, img.dtype), batch)
        for embedding in (t5_embedding, clip_embedding)
    )
    img_ids = position_ids(frames, height // patch_size, width // patch_size, img.device)
    return {
        "img": rearrange(
            img, "b c t (h ph) (w pw) -> b (t h w) (c ph pw)", ph=patch_size, pw=patch_size
        ),
        "img_ids": repeat(img_ids.to(img.dtype), "n c -> b n c", b=batch),
        "txt": txt,
        "txt_ids": torch.zeros(batch, txt.shape[1], 3, device=img.device, dtype=img.dtype),
        "y_vec": y_vec,
    }


def position_ids(
    frames: int, height: int, width: int, device: torch.device | str | None = None
) -> Tensor:
    """(t, h, w) of every patch, int64 [frames * height * width, 3], w fastest."""
    axes = [torch.arange(size, device=device) for size in (frames, height, width)]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    return rearrange(grid, "c t h w -> (t h w) c")


def video_tokens_of(img: Tensor, patch_size: int) -> int:
    """The tokens that latents [B, C, T, H, W] add to the sequence: Open-Sora's added_tokens."""
    frames, height, width = img.shape[2:]
    return frames * (height // patch_size) * (width // patch_size)


def dropout_condition(
    prob: float, txt: Tensor, null_txt: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """`txt` ([B, L, D] or [B, C]) with each sample replaced by `null_txt` with probability `prob`.

    `null_txt`, with or without a batch axis of 1, is the empty caption's embedding
    (`EmbeddingDataset.null`); a sequence is padded to L as `pad_null`. It takes the device and
    dtype of `txt`. One number is drawn per sample, on `txt`'s device, also where `prob` is 0; call
    it for T5 and for CLIP apart and they drop independently, as Open-Sora's do.
    """
    if not 0 <= prob <= 1:
        raise InputError(f"dropout probability is {prob}: expected 0 to 1.")
    null = null_txt if null_txt.ndim == txt.ndim else null_txt[None]
    if null.ndim != txt.ndim or null.shape[0] != 1 or null.shape[-1] != txt.shape[-1]:
        raise InputError(
            f"a null embedding of shape {list(null_txt.shape)} for a batch of {list(txt.shape)}: "
            f"expected {[1, *txt.shape[1:]]}, of the same encoder."
        )
    if txt.ndim == 3:
        null = pad_null(null, txt.shape[1])
    drawn = torch.rand(txt.shape[0], device=txt.device, generator=generator)
    dropped = (drawn < prob).view(-1, *[1] * (txt.ndim - 1))  # [B, 1, 1] or [B, 1]
    return torch.where(dropped, null.to(txt.device, txt.dtype), txt)


def pad_null(null_txt: Tensor, length: int) -> Tensor:
    """`null_txt` [1, L0, D] with its last vector repeated until it is [1, length, D].

    The last vector is that of a pad, where the dataset has attention_mask none. Raises InputError
    when it is longer already: nothing is cut.
    """
    missing = length - null_txt.shape[1]
    if missing < 0 or null_txt.shape[1] == 0:
        raise InputError(
            f"the null embedding has {null_txt.shape[1]} vectors, the batch {length}: expected 1 "
            f"to {length}. Both must come from one dataset, made with one max_length."
        )
    if missing == 0:
        return null_txt
    return torch.cat([null_txt, null_txt[:, -1:].expand(-1, missing, -1)], dim=1)


def _check_latents(img: Tensor, patch_size: int) -> None:
    """InputError unless `img` is [B, C, T, H, W] and divides into patches."""
    if patch_size < 1:
        raise InputError(f"patch_size is {patch_size}: expected 1 or more.")
    if img.ndim != 5 or 0 in img.shape:
        raise InputError(f"latents of shape {list(img.shape)}: expected [B, C, T, H, W].")
    if img.shape[3] % patch_size or img.shape[4] % patch_size:
        raise InputError(
            f"latents of {img.shape[3]} x {img.shape[4]} do not divide into patches of "
            f"{patch_size} x {patch_size}. Use the trainer's patch_size, and clips of its buckets."
        )


def _check_embedding(name: str, embedding: Tensor, ndim: int, batch: int) -> None:
    if embedding.ndim != ndim or embedding.shape[0] not in (1, batch):
        expected = "[B, L, D]" if ndim == 3 else "[B, C]"
        raise InputError(
            f"{name} has shape {list(embedding.shape)}: expected {expected}, where B is the "
            f"latents' batch {batch}, or 1."
        )


def _check_alignment(length: int, added_tokens: int, seq_align: int) -> None:
    if seq_align < 1:
        raise InputError(f"seq_align is {seq_align}: expected 1 or more.")
    total = added_tokens + length
    if total % seq_align:
        raise InputError(
            f"the text has {length} vectors and the video {added_tokens} tokens: {total} together, "
            f"no multiple of seq_align {seq_align}. Precompute the captions of this bucket with "
            f"encoders.t5.seq_align {seq_align} and encoders.t5.added_tokens {added_tokens}: pads "
            "are encoded with the caption, so they cannot be added here."
        )


def _over_batch(embedding: Tensor, batch: int) -> Tensor:
    if embedding.shape[0] == batch:
        return embedding
    return repeat(embedding, "1 ... -> bs ...", bs=batch)
