"""How fast this device encodes some of the captions, for `plan --calibrate`."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator

from embed_precompute.config.schema import Config
from embed_precompute.encoders.device import (
    check_machine,
    device_name,
    resolve_device,
    start,
    warn_of_cpu,
)
from embed_precompute.encoders.encoder import (
    WINDOW_TOKENS,
    PendingOutput,
    StreamedEncoder,
    TextEncoder,
)
from embed_precompute.encoders.peaks import peak_flops
from embed_precompute.encoders.tokenizer import TokenBatch
from embed_precompute.errors import InputError
from embed_precompute.job.estimate import SampledCaptions
from embed_precompute.job.price import CPU, GPU, Speed, flop_count
from embed_precompute.steps import counted, steps

SECONDS = 5.0
"""No forward is begun later; a CPU may take minutes for the first."""
IN_FLIGHT = 2
"""Forwards whose output is on its way while the next one runs, as in a run."""


def calibrate(config: Config, sampled: SampledCaptions) -> Speed:
    """Load each encoder as a run does, and encode sampled captions in its own batches for some
    seconds. Raises InputError: no caption, or an encoder that cannot run here."""
    runtime = config.runtime
    device = resolve_device(runtime.device)
    check_machine(runtime.device, device, sampled.encoders, runtime.weights)
    warn_of_cpu(runtime.device, device)
    if not sampled.figures.encoded:
        raise InputError("--calibrate: no caption that was read can be encoded.")
    texts = list(dict.fromkeys(each.text for each in sampled.kept if each.text is not None))
    rates, said = {}, []
    encoders = sampled.encoders
    for resolved in steps(encoders, len(encoders), "calibrating", " encoders"):
        encoder = start(resolved, device, config.output.dtype, "never", runtime.weights)
        captions = resolved.opened.tokenizer.encode(texts)
        began = time.perf_counter()
        rows = _encode(encoder, resolved.batches(captions), began + SECONDS)
        seconds = time.perf_counter() - began
        rate = rates[resolved.name] = resolved.flops(captions.select(rows)) / seconds
        peak = peak_flops(device_name(device), resolved.options.dtype)
        of_peak = f", {100 * rate / peak:.0f} % of its peak" if peak else ""
        said.append(
            f"{resolved.name} {flop_count(rate)}/s{of_peak} "
            f"({counted(len(rows), 'caption')} in {seconds:.1f} s)"
        )
        del encoder  # before the next one is loaded
    basis = f"as measured on this {device_name(device)}: {'; '.join(said)}"
    return Speed(basis, rates, process=GPU if device.startswith("cuda") else CPU)


def _encode(encoder: TextEncoder, batches: Iterator[TokenBatch], end: float) -> list[int]:
    """The captions that were encoded until `end`; of streamed weights, which come once for many
    batches, in one window."""
    rows: list[int] = []

    def until_the_end() -> Iterator[TokenBatch]:
        tokens = 0
        for batch in batches:
            rows.extend(batch.rows.tolist())
            yield batch
            tokens += batch.input_ids.size
            if isinstance(encoder, StreamedEncoder) and tokens >= WINDOW_TOKENS:
                return
            if time.perf_counter() > end:
                return

    begun: deque[PendingOutput] = deque()
    for pending in encoder.submit_all(until_the_end()):
        begun.append(pending)
        if len(begun) > IN_FLIGHT:
            begun.popleft().wait()
    for pending in begun:
        pending.wait()
    return rows
