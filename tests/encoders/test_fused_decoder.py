"""Our own layers of decoder-only models against transformers' models, one caption at a time.

With a checkpoint, through an encoder and its options: test_families, test_decoder.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers

from embed_precompute.encoders.device import compiler
from embed_precompute.encoders.families.decoder import sliding_windows
from embed_precompute.encoders.fused import stream
from embed_precompute.encoders.fused.decoder import DecoderLayers
from embed_precompute.encoders.tokenizer import TokenBatch

RELATIVE = 3e-6
"""Largest relative difference from transformers in float32."""
IN_TRANSFORMERS_4 = transformers.__version__.startswith("4.")
SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4} | {
    "num_key_value_heads": 2,
    "num_hidden_layers": 4,
    "vocab_size": 300,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-5,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0} | {
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
SECTIONS = {"rope_type": "default", "mrope_section": [2, 3, 3]}
GEMMA = {"head_dim": 24, "query_pre_attn_scalar": 20, "pad_token_id": 0}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {"rope_scaling": LLAMA3, "rope_theta": 500.0}),
    "llama-biased": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {"head_dim": 32, "sliding_window": 20}),
    "qwen2": ("Qwen2", {"rope_theta": 1000.0}),
    "qwen2-linear": ("Qwen2", {"rope_scaling": {"rope_type": "linear", "factor": 4.0}}),
    "qwen3": ("Qwen3", {"head_dim": 24}),
    "qwen2_5_vl": ("Qwen2_5_VLText", {"rope_scaling": SECTIONS, "use_sliding_window": False}),
    "qwen3_vl": ("Qwen3VLText", {"head_dim": 16, "rope_scaling": SECTIONS}),
    "gemma2": ("Gemma2", {**GEMMA, "sliding_window": 20, "attn_logit_softcapping": 2.0}),
    "gemma2-uncapped": ("Gemma2", {**GEMMA, "attn_logit_softcapping": None}),
    "gemma3": ("Gemma3Text", {**GEMMA, "sliding_window": 20, "sliding_window_pattern": 3}),
}
with_compiler = pytest.mark.skipif(compiler() is None, reason="no C++ compiler")
LENGTHS = (1, 2, 3, 5, 5, 5, 17, 17, 19, 20, 21, 33, 60, 60)


def model_of(name: str, **changes: Any) -> Any:
    """A random model that hides nothing: no norm is one, no bias is zero."""
    kind, fields = MODELS[name]
    kind = "Qwen2_5_VL" if IN_TRANSFORMERS_4 and kind == "Qwen2_5_VLText" else kind
    if not hasattr(transformers, f"{kind}Config"):
        pytest.skip(f"transformers {transformers.__version__} has no {kind}")
    torch.manual_seed(7)
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **fields, **changes})
    name = kind.removesuffix("Text") + "TextModel" if kind.endswith("Text") else f"{kind}Model"
    config._attn_implementation = "eager"
    model = getattr(transformers, name)(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.normal_(0.0 if "gemma" in config.model_type else 1.0, 0.2)
            elif parameter.dim() == 2:
                parameter.normal_(0.0, parameter.shape[1] ** -0.5)
            else:
                parameter.normal_(0.0, 0.3)
    return model.eval().requires_grad_(False)


def layers_of(model: Any, wanted: tuple[int, ...] = (0, 2, 4), **fields: Any) -> DecoderLayers:
    """`combine` puts the outputs side by side."""
    fields = {"compiled": False, "windows": sliding_windows(model.config), **fields}
    return DecoderLayers(
        model, wanted, 64, combine=lambda found, _: torch.cat(found, dim=-1), **fields
    )


def captions_of(lengths: tuple[int, ...], prefix: list[int] | None = None) -> list[list[int]]:
    random = np.random.default_rng(5)
    return [[*(prefix or []), *random.integers(1, 300, size=n).tolist()] for n in lengths]


def expected(model: Any, ids: list[int], wanted: tuple[int, ...] = (0, 2, 4)) -> list[torch.Tensor]:
    """What transformers makes of one caption: the output of each layer asked for, [L, D]."""
    states: list[torch.Tensor] = []

    def keep(layer: Any, given: Any, output: Any) -> None:
        states.append(output[0] if isinstance(output, tuple) else output)

    hooks = [layer.register_forward_hook(keep) for layer in model.layers]
    first = model.layers[0]
    hooks.append(first.register_forward_pre_hook(lambda layer, given: keep(layer, None, given)))
    model(input_ids=torch.tensor([ids]), use_cache=False)
    for hook in hooks:
        hook.remove()
    return [states[tap][0] for tap in wanted]


def packed(captions: list[list[int]], stream: int = 320) -> tuple[torch.Tensor, TokenBatch]:
    """One packed stream: its ids [T], and the batch."""
    ids = np.zeros((1, stream), dtype=np.int64)
    lengths = np.array([len(each) for each in captions], dtype=np.int32)
    ids[0, : lengths.sum()] = np.concatenate(captions)
    nothing = np.zeros(len(captions), dtype=np.int32)
    batch = TokenBatch(
        ids, lengths, lengths, nothing, nothing, np.arange(len(captions)), packed=True
    )
    return torch.from_numpy(ids[0]), batch


def run(layers: DecoderLayers, captions: list[list[int]]) -> list[Any]:
    """For each caption, the outputs of `layers` over one packed stream, [L, D] each."""
    ids, batch = packed(captions)
    with torch.inference_mode():
        output = layers(ids, batch).clone()
    ends = np.cumsum(batch.lengths).tolist()
    return [
        output[end - len(each) : end].split(SIZES["hidden_size"], dim=-1)
        for each, end in zip(captions, ends, strict=True)
    ]


def difference(found: list[Any], wanted: list[Any]) -> float:
    return max(
        float((a - b).abs().max() / b.abs().max()) for a, b in zip(found, wanted, strict=True)
    )


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_is_transformers_caption_by_caption(name: str) -> None:
    model, captions = model_of(name), captions_of(LENGTHS)
    for caption, found in zip(captions, run(layers_of(model), captions), strict=True):
        assert difference(found, expected(model, caption)) <= RELATIVE, len(caption)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["qwen3", "mistral", "gemma2", "gemma3"])
def test_neighbours_order_and_place_change_no_bit(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Several products and attention calls, too; the last product reaches past the end."""
    monkeypatch.setattr(stream, "ATTENTION_TOKENS", 60)
    layers = layers_of(model_of(name).to(dtype))
    layers._workspace._product_rows = 100
    captions = captions_of(LENGTHS)
    together = run(layers, captions)
    order = np.random.default_rng(3).permutation(len(captions)).tolist()
    shuffled = run(layers, [captions[row] for row in order])
    for place, row in enumerate(order):
        (alone,) = run(layers, [captions[row]])
        assert all(map(torch.equal, shuffled[place], together[row]))
        assert all(map(torch.equal, alone, together[row]))


@pytest.mark.parametrize("name", MODELS)
def test_a_shared_prefix_is_rounding_and_nothing_else(name: str) -> None:
    """Also where a window ends inside the prefix, or is shorter than it."""
    model = model_of(name)
    for length in (4, 30):
        prefix = captions_of((length,))[0]
        captions = captions_of((1, 3, 3, 12, 25, 33))
        layers = layers_of(model, prefix=prefix)
        for _ in range(2):  # the second forward has the prefix already
            found = run(layers, captions)
            for caption, outputs in zip(captions, found, strict=True):
                wanted = [each[length:] for each in expected(model, [*prefix, *caption])]
                assert difference(outputs, wanted) <= RELATIVE
        (alone,) = run(layers, captions[3:4])
        assert all(map(torch.equal, alone, found[3]))


def test_many_batches_may_pass_a_layer_before_the_next() -> None:
    model, captions = model_of("gemma3"), captions_of(LENGTHS)
    for prefix in ((), (7, 8, 9)):
        layers = layers_of(model, prefix=prefix)
        batches = [packed(captions[:5]), packed(captions[5:]), packed(captions[3:4])]
        with torch.inference_mode():
            alone = [layers_of(model, prefix=prefix)(*batch).clone() for batch in batches]
            states = [layers.begin(*batch, place) for place, batch in enumerate(batches)]
            for number in range(len(layers.blocks)):
                for state in states:
                    layers.layer(number, state)
            for state, (_, batch), expected in zip(states, batches, alone, strict=True):
                tokens = int(batch.lengths.sum())
                assert torch.equal(layers.end(state)[:tokens], expected[:tokens])


@with_compiler
def test_a_process_may_have_many_compiled_encoders() -> None:
    """torch's own limit is 8 variants of a function, and then it is an error."""
    gate = torch.nn.functional.silu
    for rows in range(2, 14):
        inner, other = torch.randn(2, rows, 8)
        expected = gate(inner) * other
        stream.Kernels(inner.device, compiled=True).activate(inner, "silu", other)
        assert torch.allclose(inner, expected, atol=1e-6)


@with_compiler
@pytest.mark.parametrize("name", ["qwen3", "gemma2"])
def test_compiled_norms_and_gates(name: str) -> None:
    model, captions = model_of(name), captions_of(LENGTHS[::3])
    layers = layers_of(model, compiled=True)
    together = run(layers, captions)
    for caption, found in zip(captions, together, strict=True):
        assert difference(found, expected(model, caption)) <= RELATIVE
    (alone,) = run(layers, captions[2:3])
    assert all(map(torch.equal, alone, together[2]))
