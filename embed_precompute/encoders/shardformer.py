"""Shardformer: T5's layers with ColossalAI's jit-fused forwards, as Open-Sora runs them.

Guarantees: the weights, their dtypes and the numbers are those of `hf` (bitwise on a CPU, tested in
every dtype), and every layer of the encoder is replaced. If ColossalAI's layers do not fit a model,
an error says so.
Costs: it needs ColossalAI 0.5.0 with the versions that it pins, and seconds to import it, when the
first model is optimised. For each residual ColossalAI makes a tensor of zeros that plain
transformers does not, so it is neither smaller nor faster: see `embed-precompute bench`.

Follows opensora/models/text/conditioner.py and opensora/acceleration/shardformer/policy/
t5_encoder.py of hpcaitech/Open-Sora. Different here: the model is not cast at the end, because the
cast would make T5's wo float16 and wo must stay float32; mT5, whose layers are T5's, is optimised
too.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
import logging
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from embed_precompute.errors import InputError

if TYPE_CHECKING:
    from transformers import T5EncoderModel

MODEL_TYPES = ("t5", "mt5")
"""umT5's layers pass other arguments and have a position bias each."""
INSTALL = (
    "ColossalAI 0.5.0 pins torch 2.5.1 and transformers 4.51.3, so give it an environment of its "
    "own: pip install 'embed-precompute[colossalai]'. Or use the implementation hf, which gives "
    "the same numbers."
)


def shardformer_t5(t5: T5EncoderModel) -> T5EncoderModel:
    """Optimise a T5 or mT5 encoder in place and return it: eval mode, no gradients, same dtypes.

    A copy.deepcopy of the result would run the original's layers: copy first, optimise then.
    Raises InputError: no ColossalAI, another version of transformers, or another kind of model.
    """
    check_usable("shardformer_t5", str(t5.config.model_type))
    with _quiet_import():
        from colossalai.shardformer import ShardConfig, ShardFormer
    shard_config = ShardConfig(enable_tensor_parallelism=False, enable_jit_fused=True)
    optimised, _ = ShardFormer(shard_config=shard_config).optimize(t5, policy=_policy_class()())
    model: Any = optimised.eval().requires_grad_(False)
    return model  # type: ignore[no-any-return]


def check_usable(what: str, model_type: str) -> None:
    """Raise InputError unless Shardformer can run on such a model; imports nothing.

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


@contextlib.contextmanager
def _quiet_import() -> Iterator[None]:
    """Hides ColossalAI's advice to install apex, TensorNVMe and other kernels."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


@functools.cache
def _policy_class() -> Any:
    """Says which forwards ColossalAI's ShardFormer puts into a T5 encoder: the feed-forward and the
    self-attention layers of T5 and mT5 get the jit-fused forward and residual addition."""
    with _quiet_import():
        from colossalai.shardformer.modeling.jit import get_jit_fused_dropout_add_func
        from colossalai.shardformer.modeling.t5 import (
            get_jit_fused_T5_layer_ff_forward,
            get_T5_layer_self_attention_forward,
        )
        from colossalai.shardformer.policies.base_policy import Policy
        from transformers.models.mt5 import modeling_mt5
        from transformers.models.t5 import modeling_t5

    class T5EncoderPolicy(Policy):  # type: ignore[misc]  # ColossalAI has no types
        def config_sanity_check(self) -> None:
            """Nothing to check: only `shardformer_t5` uses this policy, with one configuration."""

        def preprocess(self) -> Any:
            return self.model

        def module_policy(self) -> dict[Any, Any]:
            """Layer class -> its replaced methods."""
            policy: dict[Any, Any] = {}
            forwards = {
                modeling_t5.T5LayerFF: get_jit_fused_T5_layer_ff_forward,
                modeling_t5.T5LayerSelfAttention: get_T5_layer_self_attention_forward,
                modeling_mt5.MT5LayerFF: get_jit_fused_T5_layer_ff_forward,
                modeling_mt5.MT5LayerSelfAttention: get_T5_layer_self_attention_forward,
            }
            for layer, forward in forwards.items():
                self.append_or_create_method_replacement(
                    description={
                        "forward": forward(),
                        "dropout_add": get_jit_fused_dropout_add_func(),
                    },
                    policy=policy,
                    target_key=layer,
                )
            return policy

        def postprocess(self) -> Any:
            return self.model

    return T5EncoderPolicy
