"""Model inputs for a text-to-video transformer: patches, position ids, and condition dropout.

`prepare` and `prepare_ids` give what Open-Sora's functions of these names give (img, img_ids, txt,
txt_ids, y_vec), for any batch and patch size. `ConditionDropout` replaces captions of a batch by
the empty caption. Nothing is ever cut or padded so that it fits: an error says what to precompute.

Imports torch and einops, not transformers, so a training job can import it.

Written from opensora/utils/sampling.py, opensora/utils/train.py and scripts/diffusion/train.py of
https://github.com/hpcaitech/Open-Sora (Apache-2.0).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import torch
from einops import rearrange, repeat
from torch import Tensor
from torch.nn import functional

from embed_precompute.errors import InputError
from embed_precompute.train.dataset import TOKEN_MASK, EmbeddingDataset


class SequenceEmbedder(Protocol):
    """T5: prompts to [B, L, D], padded until (added_tokens + L) % seq_align == 0."""

    def __call__(self, text: list[str], added_tokens: int = 0, seq_align: int = 1) -> Tensor: ...


class PooledEmbedder(Protocol):
    """CLIP: prompts to [B, C]."""

    def __call__(self, text: list[str]) -> Tensor: ...


def prepare(
    t5: SequenceEmbedder,
    clip: PooledEmbedder,
    img: Tensor,
    prompt: str | Sequence[str],
    seq_align: int = 1,
    patch_size: int = 2,
) -> dict[str, Tensor]:
    """Encode `prompt` and make the model's inputs for the latents `img` [B, C, T, H, W].

    One prompt is encoded once and used for the whole batch. With n times as many prompts as
    latents, the latents are repeated n times, as classifier-free guidance needs. The result is that
    of `prepare_ids`. Raises InputError for any other number of prompts.
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

    With N = T * (H / patch_size) * (W / patch_size) the result has, on the device and in the dtype
    of `img`:

    img      [B, N, C * patch_size ** 2]   patches in the order t, h, w; in a patch: c, ph, pw
    img_ids  [B, N, 3]                     t, h, w of each patch
    txt      [B, L, D]                     `t5_embedding`; repeated where its batch is 1
    txt_ids  [B, L, 3]                     zeros: the text encoder added the positions itself
    y_vec    [B, C]                        `clip_embedding`; repeated where its batch is 1

    The ids are exact up to 256 in bfloat16 and up to 2,048 in float16. Raises InputError where
    shapes do not fit, or where N + L is no multiple of `seq_align`, the trainer's sequence-parallel
    size.
    """
    _check_latents(img, patch_size)
    batch, _, frames, height, width = img.shape
    _check_embedding("t5_embedding", t5_embedding, 3, batch)
    _check_embedding("clip_embedding", clip_embedding, 2, batch)
    if seq_align < 1:
        raise InputError(f"seq_align is {seq_align}: expected 1 or more.")
    length, added_tokens = t5_embedding.shape[1], video_tokens_of(img, patch_size)
    if (length + added_tokens) % seq_align:
        raise InputError(
            f"the text has {length} vectors and the video {added_tokens} tokens: "
            f"{length + added_tokens} together, no multiple of seq_align {seq_align}. Precompute "
            f"the captions of this bucket with encoders.t5.seq_align {seq_align} and "
            f"encoders.t5.added_tokens {added_tokens}: pads are encoded with the caption, so they "
            "cannot be added here."
        )
    txt, y_vec = (
        embedding.to(img.device, img.dtype).expand(batch, *embedding.shape[1:])
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
    """(t, h, w) of every patch, int64 [frames * height * width, 3]; w changes fastest."""
    axes = [torch.arange(size, device=device) for size in (frames, height, width)]
    grid = torch.stack(torch.meshgrid(*axes, indexing="ij"))
    return rearrange(grid, "c t h w -> (t h w) c")


def video_tokens_of(img: Tensor, patch_size: int) -> int:
    """How many tokens latents [B, C, T, H, W] add to the sequence: Open-Sora's added_tokens."""
    frames, height, width = img.shape[2:]
    return frames * (height // patch_size) * (width // patch_size)


class ConditionDropout:
    """Replaces captions of a batch by the empty caption, as classifier-free guidance needs.

        dropout = ConditionDropout(dataset, {"text_t5": 0.316, "text_clip": 0.316})
        for batch in loader:
            batch = dropout(batch)

    `dataset` gives the empty caption's embeddings: an EmbeddingDataset, or a JoinedDataset or
    Subset of one. `prob` is the probability for each tensor; each tensor is dropped independently
    of the others, as in Open-Sora's trainer, and one that is not named is kept. A single number
    drops all tensors of a sample together.

    A dropped sequence becomes what the model is given for an empty prompt at inference:
    - All positions are stored (`keep: all`): the empty caption lengthened by repeating its last
      vector, which is a pad's, up to the sample's length, as Open-Sora's trainer does. Length and
      mask stay.
    - Real ones are: what is stored of the empty caption, then zeros. The sample's length and mask
      become those of the empty caption; the batch gets longer where that is longer.
    In both, text_<name>_token_mask becomes that of the empty caption.

    Raises InputError for a batch of a dataset that stores other positions. On an accelerator only
    the first batch is checked: looking at each would wait for the device.
    """

    def __init__(self, dataset: Any, prob: float | Mapping[str, float]) -> None:
        dataset = _embeddings_of(dataset)
        null = dataset.null
        self._null = {name: null[name] for name in null if not name.endswith(TOKEN_MASK)}
        self._tokens = {name: null[name + TOKEN_MASK] for name in null if name + TOKEN_MASK in null}
        self._positions = {name: dataset.positions(name) for name in self._null}
        self._together = not isinstance(prob, Mapping)
        self._prob = dict(prob) if isinstance(prob, Mapping) else dict.fromkeys(self._null, prob)
        for name, value in self._prob.items():
            _check_probability(value)
            if name not in self._null:
                raise InputError(f"the dataset has no {name}, only {', '.join(self._null)}.")
        self._checked = False

    def __repr__(self) -> str:
        how = "together" if self._together else "independently"
        return f"ConditionDropout({self._prob}, {how})"

    def __call__(
        self, batch: Mapping[str, Any], generator: torch.Generator | None = None
    ) -> dict[str, Any]:
        """A new batch like `batch`, which `collate_embeddings` made, with captions dropped.

        The random numbers are drawn on the device of the embeddings, one for each sample and
        tensor, or one for each sample where all its tensors are dropped together.
        """
        made, drawn = dict(batch), None
        for name, prob in self._prob.items():
            values, null = _entry(batch, name), self._null[name]
            null = null.to(values.device, values.dtype)
            if drawn is None or not self._together:
                drawn = torch.rand(values.shape[0], device=values.device, generator=generator)
            dropped = drawn.to(values.device) < prob
            if values.ndim == 3:
                self._check(batch, name)
            if values.ndim == 2:
                made[name] = torch.where(dropped[:, None], null, values)
            elif self._positions[name] != "all":
                longest = max(values.shape[1], len(null))
                values, null = (
                    functional.pad(tensor, (0, 0, 0, longest - tensor.shape[-2]))
                    for tensor in (values, null)
                )
                made[name] = torch.where(dropped[:, None, None], null, values)
                lengths, num_null = _entry(batch, f"{name}_length"), len(self._null[name])
                lengths = torch.where(dropped.to(lengths.device), num_null, lengths)
                made[f"{name}_length"] = lengths
                positions = torch.arange(longest, device=lengths.device)
                made[f"{name}_mask"] = positions < lengths[:, None]
            else:
                null = pad_null(null[None], values.shape[1])
                stored = _entry(batch, f"{name}_mask").to(values.device)
                made[name] = torch.where((dropped[:, None] & stored)[..., None], null, values)
            if (mask := batch.get(name + TOKEN_MASK)) is not None:
                longest, tokens = made[name].shape[1], self._tokens[name].to(mask.device)
                tokens, mask = (
                    functional.pad(each, (0, longest - each.shape[-1])) for each in (tokens, mask)
                )
                drop = dropped.to(mask.device)[:, None]
                made[name + TOKEN_MASK] = torch.where(drop, tokens, mask)
        self._checked = True
        return made

    def _check(self, batch: Mapping[str, Any], name: str) -> None:
        """InputError where a sequence of the batch stores other positions than this dataset."""
        lengths, stored = _entry(batch, f"{name}_length"), _entry(batch, f"{name}_mask")
        tokens = batch.get(name + TOKEN_MASK)
        if tokens is None or (self._checked and lengths.device.type != "cpu"):
            return
        pads = int((stored & ~tokens.to(stored.device)).sum(1).max())
        kept = self._positions[name]
        other = pads > (kept == "real+1")
        if kept == "all":  # a caption that fills max_length has no pad either
            other = pads == 0 and bool((lengths < len(self._null[name])).any())
        if other:
            found = "real ones only" if kept == "all" else "pads too"
            raise InputError(
                f"{name}: the dataset of ConditionDropout stores the positions {kept} of a caption "
                f"(keep), and the batch is of one that stores {found}. Give ConditionDropout the "
                "dataset that the loader reads."
            )


def _embeddings_of(dataset: Any) -> EmbeddingDataset:
    """The EmbeddingDataset itself, or the one that it wraps."""
    found = dataset
    while found is not None and not isinstance(found, EmbeddingDataset):
        found = getattr(found, "embeddings", getattr(found, "dataset", None))
    if found is None:
        raise InputError(
            f"{type(dataset).__name__} is no EmbeddingDataset and has none as `embeddings` or "
            "`dataset`: give ConditionDropout the EmbeddingDataset."
        )
    return found


def _entry(batch: Mapping[str, Any], name: str) -> Any:
    if name not in batch:
        raise InputError(
            f"the batch has no {name}, only {', '.join(batch)}: expected one that "
            "collate_embeddings made."
        )
    return batch[name]


def dropout_condition(
    prob: float, txt: Tensor, null_txt: Tensor, generator: torch.Generator | None = None
) -> Tensor:
    """`txt` [B, L, D] or [B, C], each sample replaced by `null_txt` with probability `prob`.

    Open-Sora's function of this name, for a tensor without a mask whose null embedding has its
    shape ([1, L, D] or [1, C]; the axis of 1 may be missing). `ConditionDropout` is for everything
    else: lengths, masks, and a null embedding of another length. The result has the device and
    dtype of `txt`. One random number is drawn for each sample, on that device, even if `prob` is 0.
    """
    _check_probability(prob)
    null = null_txt if null_txt.ndim == txt.ndim else null_txt[None]
    if null.shape != (1, *txt.shape[1:]):
        raise InputError(
            f"a null embedding of shape {list(null_txt.shape)} for a batch of {list(txt.shape)}: "
            f"expected {[1, *txt.shape[1:]]}. Where only the length differs, use "
            "ConditionDropout(dataset, prob), which knows by what rule that dataset's null "
            "embedding is lengthened."
        )
    drawn = torch.rand(txt.shape[0], device=txt.device, generator=generator)
    dropped = (drawn < prob).view(-1, *[1] * (txt.ndim - 1))  # [B, 1, 1] or [B, 1]
    return torch.where(dropped, null.to(txt.device, txt.dtype), txt)


def pad_null(null_txt: Tensor, length: int) -> Tensor:
    """`null_txt` [1, L0, D] with its last vector repeated until it is [1, length, D].

    For datasets that store all positions, where the last vector is a pad's. Raises InputError where
    it is longer than `length`: nothing is cut.
    """
    missing = length - null_txt.shape[1]
    if missing < 0 or null_txt.shape[1] == 0:
        raise InputError(
            f"the null embedding has {null_txt.shape[1]} vectors, the batch {length}: expected 1 "
            f"to {length}. Both must come from one dataset; with seq_align, from one whose "
            "max_length seq_align divides."
        )
    if missing == 0:
        return null_txt
    return torch.cat([null_txt, null_txt[:, -1:].expand(-1, missing, -1)], dim=1)


def _check_probability(prob: float) -> None:
    if not 0 <= prob <= 1:
        raise InputError(f"dropout probability is {prob}: expected 0 to 1.")


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
