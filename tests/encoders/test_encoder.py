"""An encoder's own checks: shapes, masks that are given, memory, TF32."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from family_case import encode, encoder_of
from jobs import run_code

from embed_precompute.encoders.encoder import build
from embed_precompute.encoders.tokenizer import make_batches, pack
from embed_precompute.errors import InputError, InternalError

t5 = partial(encoder_of, "t5", max_length=48, batch_tokens=192, implementation="hf")
clip = partial(encoder_of, "clip", batch_size=4, implementation="hf")


def test_only_decided_shapes_are_run(corpus: list[str], tiny_t5: Path) -> None:
    encoder = t5(tiny_t5, attention_mask="padding", buckets=(16, 32))
    resolved = encoder.resolved
    tokenizer = resolved.opened.tokenizer
    used = {batch.input_ids.shape for batch in resolved.batches(tokenizer.encode(corpus))}
    assert used == set(resolved.decision.shapes)
    odd = next(make_batches(tokenizer.empty, ((5, 7),), 0, tokenizer.empty))
    with pytest.raises(InternalError, match=r"A batch is \(5, 7\), packed False: expected one of"):
        encoder.encode(odd)
    fused = t5(tiny_t5, attention_mask="padding", implementation="fused", stream_tokens=64)
    with pytest.raises(InternalError, match="expected one of"):
        fused.encode(next(pack(tokenizer.empty, 65, 0)))


def test_what_arrives_is_contiguous_and_in_the_output_dtype(tiny_t5: Path) -> None:
    resolved = t5(tiny_t5, seq_align=64, added_tokens=1000).resolved
    encoder = build(resolved, "cpu", "bfloat16")
    (batch,) = resolved.batches(resolved.opened.tokenizer.empty, null=True)
    values = encoder.encode(batch)[""]
    assert isinstance(values, torch.Tensor)
    assert values.shape == (3, 64, 64)
    assert values.dtype == torch.bfloat16
    assert values.is_contiguous()
    assert not values.requires_grad


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_batch_without_any_pad_is_no_special_case(
    corpus: list[str], tiny_t5: Path, dtype: str
) -> None:
    """transformers 5 drops a mask that masks nothing; then neighbours would choose the kernel."""
    fields = {"attention_mask": "padding", "max_length": 16, "batch_tokens": 64, "dtype": dtype}
    encoder = t5(tiny_t5, **fields)
    full = [text for text in corpus if len(text) > 200][:4]
    assert encoder.resolved.opened.tokenizer.encode(full).num_ids == [16] * 4
    masks: list[torch.Tensor] = []
    encoder.model.register_forward_pre_hook(
        lambda model, args, inputs: masks.append(inputs["attention_mask"]), with_kwargs=True
    )
    together = encode(encoder, full)[""]
    for text, row in zip(full, together, strict=True):
        assert torch.equal(row, encode(encoder, [text])[""][0])
    assert len({(mask.shape, mask.dtype) for mask in masks}) == 1
    assert masks[0].ndim == (2 if transformers.__version__.startswith("4.") else 4)


def test_out_of_memory_names_the_setting(
    tiny_t5: Path, tiny_clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def failing(error: Exception) -> Any:
        def forward(batch: Any) -> Any:
            raise error

        return forward

    for encoder, setting in ((t5(tiny_t5), "batch_tokens is 192"), (clip(tiny_clip), "batch_size")):
        for error in (
            torch.OutOfMemoryError("CUDA out of memory"),
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't"),
        ):
            monkeypatch.setattr(encoder, "forward", failing(error))
            with pytest.raises(InputError, match=f"encoders.enc.{setting}"):
                encode(encoder, ["x"])
        monkeypatch.setattr(encoder, "forward", failing(RuntimeError("a bug")))
        with pytest.raises(RuntimeError, match="a bug"):
            encode(encoder, ["x"])


@pytest.mark.parametrize("implementation", ["hf", "fused"])
def test_tf32_is_as_the_options_say(
    tiny_clip: Path, monkeypatch: pytest.MonkeyPatch, implementation: str
) -> None:
    for wanted in (True, False):
        encoder = clip(tiny_clip, implementation=implementation, tf32=wanted)
        original, seen = encoder.forward, []

        def forward(batch: Any, original: Any = original, seen: Any = seen) -> Any:
            seen.append(torch.backends.cuda.matmul.allow_tf32)
            return original(batch)

        monkeypatch.setattr(encoder, "forward", forward)
        torch.backends.cuda.matmul.allow_tf32 = not wanted
        try:
            for batch in encoder.resolved.every_shape():
                encoder.encode(batch)
            assert set(seen) == {wanted}
            assert torch.backends.cuda.matmul.allow_tf32 is not wanted
        finally:
            torch.backends.cuda.matmul.allow_tf32 = False  # torch's default


def test_configuration_needs_no_torch() -> None:
    code = (
        "import sys, embed_precompute.config.schema, embed_precompute.encoders.resolve; "
        "print([m for m in ('torch', 'transformers', 'huggingface_hub') if m in sys.modules])"
    )
    assert run_code(code) == "[]\n"
