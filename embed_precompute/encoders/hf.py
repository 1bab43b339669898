"""The reference implementation: transformers' own T5 and CLIP, run on fixed shapes.

Guarantees: the numbers are those of the transformers model for the same ids, and bitwise a function
of the caption and the shape, whatever the other lines hold. attention_mask none calls the model
without a mask, as Open-Sora does. Every weight comes from the checkpoint, in the dtype asked.
Costs: weights once in memory in the asked dtype (memory-mapped where the file has that dtype; on a
GPU not in host memory at all, unless they do not fit there); no compilation, no fused kernels.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

from embed_precompute.encoders import offload, weights
from embed_precompute.encoders.batching import TokenBatch
from embed_precompute.encoders.checkpoint import MODEL_CLASSES, quiet_transformers, weight_files
from embed_precompute.encoders.spec import ResolvedEncoder
from embed_precompute.encoders.transfers import Copies, Lines, Pending, upload
from embed_precompute.errors import EmbedPrecomputeError, InputError, InternalError

TRANSFORMERS_5 = int(transformers.__version__.split(".")[0]) >= 5
ENCODER_PREFIXES = {"t5": ("encoder.",), "clip": ("text_model.", "encoder.")}
"""How the text encoder's weights begin in a checkpoint that may hold more than it (transformers 5
drops `text_model.` before it reports)."""
NOT_COMPILED = (
    " Layers that are not compiled may stay in host memory in part: set compile false and give a "
    "new output.path (compile is part of the fingerprint)."
)
HARMLESS_LEFTOVERS = ("position_ids", "embed_tokens.weight")
"""Buffers that older versions saved, and the second name of T5's shared embedding."""


class HfEncoder:
    """A transformers text encoder with its mode decided once."""

    def __init__(
        self, resolved: ResolvedEncoder, device: str, output_dtype: str, model: Any
    ) -> None:
        """`model` is what `load_on` gives, for this device."""
        self.resolved = resolved
        self._device = torch.device(device)
        self._dtype: torch.dtype = getattr(torch, resolved.config.dtype)
        self._copies = Copies(self._device, getattr(torch, output_dtype))
        self._masked = resolved.config.attention_mask == "padding"
        self._output = "pooler_output" if resolved.pooled else "last_hidden_state"
        self._shapes = {*resolved.shapes, resolved.null_shape}
        self._model = model

    def weight_bytes(self) -> int:
        """See `TextEncoder.weight_bytes`."""
        return offload.num_bytes(self._model)

    def encode(self, batch: TokenBatch) -> Lines:
        """See `TextEncoder.encode`."""
        return self.submit(batch).wait()

    def submit(self, batch: TokenBatch) -> Pending:
        """See `TextEncoder.submit`."""
        if batch.input_ids.shape not in self._shapes:
            raise InternalError(f"A batch is {batch.input_ids.shape}: expected {self._shapes}.")
        message = forward_too_large(self.resolved, batch, self._device)
        with torch.inference_mode(), out_of_memory(message), tf32(self.resolved):
            input_ids = upload(torch.from_numpy(batch.input_ids), self._device)
            output = self._model(input_ids=input_ids, attention_mask=self._mask(batch))
            embeddings: torch.Tensor = getattr(output, self._output)
            return self._copies.download(embeddings, reused=False)

    def _mask(self, batch: TokenBatch) -> torch.Tensor | None:
        if not self._masked:
            return None
        mask = padding_mask(batch.lengths, batch.input_ids.shape[1], self._dtype)
        return upload(mask, self._device)


def build(
    resolved: ResolvedEncoder, device: str, output_dtype: str, *, may_offload: bool
) -> HfEncoder:
    """See `encoders.build`."""
    model = load_on(resolved, torch.device(device), may_offload=may_offload)
    return HfEncoder(resolved, device, output_dtype, model)


def padding_mask(lengths: NDArray[np.int32], length: int, dtype: torch.dtype) -> torch.Tensor:
    """Mask under which only a line's first `lengths` tokens are attended.

    transformers 4: [B, L], 1 for real tokens. From 5 on the finished additive mask, [B, 1, 1, L]:
    given [B, L] it leaves the mask out when no line of the batch has a pad, and then a caption's
    kernel would depend on its neighbours.
    """
    real = torch.arange(length)[None, :] < torch.from_numpy(lengths)[:, None]  # [B, L]
    if not TRANSFORMERS_5:
        return real.to(torch.int64)
    additive = torch.zeros(real.shape, dtype=dtype).masked_fill(~real, torch.finfo(dtype).min)
    return additive[:, None, None, :]


def load_on(
    resolved: ResolvedEncoder,
    device: torch.device,
    *,
    may_offload: bool,
    adapt: Callable[[Any], Any] = lambda model: model,
) -> Any:
    """The model on `device`, or the last of its layers in host memory when they do not fit there
    and `may_offload`. `adapt` changes it in place before that.

    A GPU gets each weight from the file, and the host never holds the model. Raises InputError as
    `load_checkpoint` does, and when it does not fit.
    """
    too_large = weights_too_large(resolved, str(device))
    with out_of_memory(too_large):
        free = offload.free_bytes(device)
        if free is None:
            return adapt(load_model(resolved)).to(device)
        size, config = _size(resolved), _config(resolved)
        room = free - offload.forward_bytes(resolved, config)
        may_offload = may_offload and not resolved.compiled
        if size <= (room if may_offload else free):
            return adapt(load_model(resolved, device_map={"": str(device)})).to(device)
        if not may_offload:
            raise InputError(too_large + (NOT_COMPILED if resolved.compiled else ""))
        model = adapt(load_model(resolved))
        layers = offload.layers_of(model, pooled=resolved.pooled)
        offload.place(f"encoders.{resolved.name}", model, layers, device, room)
        return model


def _model_class(kind: str, model_type: str) -> Any:
    return getattr(transformers, MODEL_CLASSES[kind][model_type])


def _config(resolved: ResolvedEncoder) -> Any:
    config_class = _model_class(resolved.config.kind, resolved.model_type).config_class
    return config_class.from_pretrained(str(resolved.folder), local_files_only=True)


def _size(resolved: ResolvedEncoder) -> int:
    """Bytes of the weights in the asked dtype."""
    kind, folder = resolved.config.kind, resolved.folder
    class_name = MODEL_CLASSES[kind][resolved.model_type]
    files = weight_files(f"encoders.{resolved.name}.pretrained", str(folder), folder, class_name)
    return weights.loaded_bytes(files, kind, getattr(torch, resolved.config.dtype))


def load_model(resolved: ResolvedEncoder, **hf_kwargs: Any) -> Any:
    """The model in eval mode, every weight from the checkpoint in the asked dtype.

    `hf_kwargs` go to transformers' from_pretrained: another attention implementation, say.
    Raises InputError as `load_checkpoint` does.
    """
    where = f"encoders.{resolved.name}.pretrained"
    dtype: torch.dtype = getattr(torch, resolved.config.dtype)
    kind, model_type = resolved.config.kind, resolved.model_type
    model = load_checkpoint(where, resolved.folder, kind, model_type, dtype=dtype, **hf_kwargs)
    width = model.config.hidden_size if resolved.pooled else model.config.d_model
    if width != resolved.dim:
        raise InternalError(f"{where}: the model gives {width} numbers, not {resolved.dim}.")
    _check_dtype(where, model, dtype)
    return model


def load_checkpoint(
    where: str,
    folder: Path,
    kind: str,
    model_type: str,
    *,
    dtype: torch.dtype | str,
    **hf_kwargs: Any,
) -> Any:
    """The text encoder in `folder`, in eval mode; `hf_kwargs` go to transformers' from_pretrained.

    Raises InputError naming weights that are missing, of another shape, or of layers that
    config.json does not have.
    """
    model_class = _model_class(kind, model_type)
    source: dict[str, Any] = {"pretrained_model_name_or_path": str(folder)}
    ours = {
        "use_safetensors": True,
        "local_files_only": True,
        "output_loading_info": True,
        "ignore_mismatched_sizes": True,  # reported to us instead of raised; refused below
        "dtype" if TRANSFORMERS_5 else "torch_dtype": dtype,
    }
    with quiet_transformers():
        try:
            if hf_kwargs.keys() <= {"attn_implementation"} and isinstance(dtype, torch.dtype):
                files = weight_files(where, str(folder), folder, model_class.__name__)
                cast = weights.read_cast(files, kind, dtype)
                if cast is not None:
                    config = model_class.config_class.from_pretrained(
                        str(folder), local_files_only=True
                    )
                    source = {
                        "pretrained_model_name_or_path": None,
                        "config": config,
                        "state_dict": cast,
                    }
            model, loading = model_class.from_pretrained(**{**hf_kwargs, **source, **ours})
        except (EmbedPrecomputeError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # safetensors and transformers raise many kinds for damage
            reason = " ".join(str(error).split())[:600]
            raise InputError(
                f"{where}: {folder} cannot be loaded as {model_class.__name__} "
                f"({type(error).__name__}: {reason}). Check that config.json belongs to these "
                "weights and that the files are complete."
            ) from error
    _check_loading(f"{where}: {folder}", kind, loading)
    return model.eval().requires_grad_(False)


def _check_loading(where: str, kind: str, loading: dict[str, Any]) -> None:
    # transformers 4 gives names, 5 gives (name, shape, shape).
    mismatched = [key if isinstance(key, str) else key[0] for key in loading["mismatched_keys"]]
    if mismatched:
        raise InputError(
            f"{where} has weights of other shapes than its config.json says: {_some(mismatched)}. "
            "Use the config.json of these weights."
        )
    if loading["missing_keys"]:
        raise InputError(
            f"{where} lacks weights that its config.json asks for: "
            f"{_some(loading['missing_keys'])}. Download or convert the checkpoint again."
        )
    # A decoder, a vision tower or a projection may be left over; parts of the encoder may not.
    leftovers = [
        key
        for key in loading["unexpected_keys"]
        if key.startswith(ENCODER_PREFIXES[kind]) and not key.endswith(HARMLESS_LEFTOVERS)
    ]
    if leftovers:
        raise InputError(
            f"{where} has encoder weights that its config.json does not know: {_some(leftovers)}. "
            "Use the config.json of these weights."
        )


def _check_dtype(where: str, model: Any, dtype: torch.dtype) -> None:
    for name, parameter in model.named_parameters():
        kept = parameter.dtype == torch.float32 and weights.kept_in_float32(name, dtype)
        if parameter.dtype != dtype and not kept:
            raise InternalError(f"{where}: {name} is {parameter.dtype}, asked was {dtype}.")


def _some(keys: Any) -> str:
    names = sorted(keys)
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def weights_too_large(resolved: ResolvedEncoder, device: str) -> str:
    """What to say when the weights do not fit."""
    return (
        f"encoders.{resolved.name}: the weights do not fit on {device}. Use a device with more "
        "memory, or a smaller dtype."
    )


def forward_too_large(resolved: ResolvedEncoder, batch: TokenBatch, device: torch.device) -> str:
    """What to say when a forward does not fit."""
    captions, length = batch.input_ids.shape
    if batch.packed:
        field, what = "stream_tokens", f"{length} tokens"
    else:
        field = "batch_size" if resolved.config.kind == "clip" else "batch_tokens"
        what = f"{captions} captions x {length} tokens"
    return (
        f"encoders.{resolved.name}.{field} is {getattr(resolved.config, field)}: a forward of "
        f"{what} does not fit in the memory of {device}. Lower it and give a new output.path "
        "(batch shapes are part of the fingerprint)."
    )


@contextlib.contextmanager
def tf32(resolved: ResolvedEncoder) -> Iterator[None]:
    """float32 products on an NVIDIA GPU as the specification says, whatever the process has set."""
    setting = torch.backends.cuda.matmul
    before = setting.allow_tf32
    setting.allow_tf32 = resolved.config.tf32
    try:
        yield
    finally:
        setting.allow_tf32 = before


@contextlib.contextmanager
def out_of_memory(message: str) -> Iterator[None]:
    """Say `message` when memory runs out, on a GPU or in the CPU's allocator."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise InputError(message) from error
    except RuntimeError as error:
        if "DefaultCPUAllocator" not in str(error):
            raise
        raise InputError(message) from error
