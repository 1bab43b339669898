"""Shardformer: T5's layers with ColossalAI's jit-fused forwards, as Open-Sora runs them.

Guarantees: the weights, their dtypes and the numbers are those of `hf` (bitwise on a CPU, tested in
every dtype); every layer of the encoder is replaced, or an error says why none can be. Tensor
parallelism, flash attention and a model whose layers it does not fit are refused.
Costs: it needs ColossalAI 0.5.0 with the versions that pins; importing that takes seconds, which is
paid when a model is optimised and not before. For each residual it makes a tensor of zeros that
plain transformers does not, so it is neither smaller nor faster: see `embed-precompute bench`.

Follows opensora/models/text/conditioner.py and opensora/acceleration/shardformer/policy/
t5_encoder.py of hpcaitech/Open-Sora. Different here: no cast at the end, which would take T5's wo
from the float32 it needs to float16; mT5, whose layers are T5's, is optimised too.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import logging
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from embed_precompute.errors import InputError, InternalError

if TYPE_CHECKING:
    from transformers import T5EncoderModel

    from embed_precompute.encoders.spec import ResolvedEncoder, TextEncoder

MODEL_TYPES = ("t5", "mt5")
"""umT5's layers pass other arguments and have a position bias each."""
INSTALL = (
    "ColossalAI 0.5.0 pins torch 2.5.1 and transformers 4.51.3, so give it an environment of its "
    "own: pip install 'embed-precompute[colossalai]'. Or use the implementation hf, which gives "
    "the same numbers."
)


def shardformer_t5(t5: T5EncoderModel) -> T5EncoderModel:
    """Optimise a T5 or mT5 encoder in place, and give it: eval mode, no gradients, same dtypes.

    A copy.deepcopy of the result would run the original's layers: copy first, optimise then.
    Raises InputError: ColossalAI is missing, beside another transformers, or for another model.
    """
    check_usable("shardformer_t5", str(t5.config.model_type))
    with _quiet_import():
        from colossalai.shardformer import ShardConfig, ShardFormer

        from embed_precompute.encoders.shardformer_policy import T5EncoderPolicy
    before = {name: parameter.dtype for name, parameter in t5.named_parameters()}
    shard_config = ShardConfig(enable_tensor_parallelism=False, enable_jit_fused=True)
    optimised, _ = ShardFormer(shard_config=shard_config).optimize(t5, policy=T5EncoderPolicy())
    model: Any = optimised.eval().requires_grad_(False)
    if {name: parameter.dtype for name, parameter in model.named_parameters()} != before:
        raise InternalError("Shardformer changed the dtype of weights, which it must not.")
    missed = [
        f"block {number}"
        for number, block in enumerate(model.encoder.block)
        if not all("forward" in vars(layer) for layer in block.layer)
    ]
    if missed:
        raise InternalError(f"Shardformer left layers as they were: {', '.join(missed)}.")
    return model  # type: ignore[no-any-return]


def check_usable(what: str, model_type: str) -> None:
    """Raise InputError unless Shardformer can run here on such a model; imports nothing.

    `what` begins the message: the setting or function that asked for it.
    """
    if model_type not in MODEL_TYPES:
        raise InputError(
            f"{what}: the model is of type {model_type!r}, but Shardformer's layers fit "
            f"{' and '.join(MODEL_TYPES)} only. Use the implementation hf."
        )
    if importlib.util.find_spec("colossalai") is None:
        raise InputError(f"{what}: ColossalAI is not installed. {INSTALL}")
    transformers = importlib.metadata.version("transformers")
    if int(transformers.split(".")[0]) >= 5:
        raise InputError(
            f"{what}: this is transformers {transformers}, whose T5 layers are called with "
            f"arguments that ColossalAI's do not take. {INSTALL}"
        )


def build(
    resolved: ResolvedEncoder, device: str, output_dtype: str, *, may_offload: bool
) -> TextEncoder:
    """The hf encoder over an optimised model; see `encoders.build`."""
    import torch

    from embed_precompute.encoders.hf import HfEncoder, load_on

    model = load_on(resolved, torch.device(device), may_offload=may_offload, adapt=shardformer_t5)
    return HfEncoder(resolved, device, output_dtype, model)


@contextlib.contextmanager
def _quiet_import() -> Iterator[None]:
    """Without ColossalAI's advice to install apex, TensorNVMe and other kernels."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


def __getattr__(name: str) -> Any:
    """`T5EncoderPolicy`, from the module that needs ColossalAI to be imported at all."""
    if name != "T5EncoderPolicy":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    check_usable("T5EncoderPolicy", MODEL_TYPES[0])
    with _quiet_import():
        from embed_precompute.encoders.shardformer_policy import T5EncoderPolicy
    return T5EncoderPolicy
