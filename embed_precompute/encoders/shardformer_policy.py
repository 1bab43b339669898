"""`T5EncoderPolicy`: which forwards ColossalAI's ShardFormer puts into a T5 encoder.

Guarantees: the feed-forward and the self-attention layer of T5 and mT5 get the jit-fused forward
and residual addition; what the policy does not do (tensor, sequence and pipeline parallelism, flash
attention, fused norms) is refused instead of ignored.
Costs: imports ColossalAI, which takes seconds and must be installed; use it through `shardformer`.
"""

from __future__ import annotations

from typing import Any

from colossalai.shardformer.modeling.jit import get_jit_fused_dropout_add_func
from colossalai.shardformer.modeling.t5 import (
    get_jit_fused_T5_layer_ff_forward,
    get_T5_layer_self_attention_forward,
)
from colossalai.shardformer.policies.base_policy import Policy
from transformers.models.mt5 import modeling_mt5
from transformers.models.t5 import modeling_t5

from embed_precompute.errors import InputError

REFUSED = {
    "enable_tensor_parallelism": "tensor parallelism: one process runs the whole encoder",
    "enable_sequence_parallelism": "sequence parallelism: one process runs the whole encoder",
    "enable_flash_attention": "flash attention: it has no place for T5's relative position bias",
    "enable_fused_normalization": "fused normalization: it needs apex and rounds differently",
    "pipeline_stage_manager": "pipeline parallelism: one process runs the whole encoder",
}
"""Field of ShardConfig -> what it would be, and why not."""


class T5EncoderPolicy(Policy):  # type: ignore[misc]  # ColossalAI has no types
    """Jit-fused forwards for the layers of a T5 or mT5 encoder, where `enable_jit_fused` is set."""

    def config_sanity_check(self) -> None:
        """Raises InputError naming the first field of ShardConfig that asks for more."""
        for field, reason in REFUSED.items():
            if getattr(self.shard_config, field):
                raise InputError(
                    f"T5EncoderPolicy: ShardConfig.{field} is set, but there is no {reason}. "
                    f"Use ShardConfig(enable_tensor_parallelism=False, enable_jit_fused=True)."
                )

    def preprocess(self) -> Any:
        return self.model

    def module_policy(self) -> dict[Any, Any]:
        """Layer class -> its replaced methods."""
        policy: dict[Any, Any] = {}
        if not self.shard_config.enable_jit_fused:
            return policy
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
