"""The kind decoder in plain transformers: one caption at a time, the whole model, no mask of ours.

What `Family.reference` asks for: it shares nothing with the code that makes embeddings.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import einops
import torch
import transformers
from safetensors import safe_open

from embed_precompute.encoders.families.base import Reference, in_dtype


def reference(checkpoint: Path, tokenizer: Path, options: Any, device: str) -> Reference:
    """(text, padded length) -> what is stored; `options` are `DecoderOptions`."""
    tokenize = transformers.AutoTokenizer.from_pretrained(tokenizer)
    config = transformers.AutoConfig.from_pretrained(checkpoint)
    whole = "AutoModelForImageTextToText" if hasattr(config, "vision_config") else "AutoModel"
    # The class that it was saved from: AutoModel of 4.51 takes no weight of a Gemma 3 with a head.
    whole = next(
        (name for name in config.architectures or () if hasattr(transformers, name)), whole
    )
    arguments = in_dtype(options.dtype)
    if config.model_type == "gemma2":  # the default of transformers 4 leaves the soft caps out
        arguments["attn_implementation"] = "eager"
    model = getattr(transformers, whole).from_pretrained(checkpoint, **arguments).to(device).eval()
    modules: Any = model.modules()
    tower = next(m for m in modules if hasattr(m, "layers") and hasattr(m, "embed_tokens"))
    states: dict[int, torch.Tensor] = {}

    def keep(number: int) -> Any:
        def hook(layer: Any, given: Any, output: Any = None) -> None:
            found = given if output is None else output
            states[number] = found[0] if isinstance(found, tuple) else found

        return hook

    tower.layers[0].register_forward_pre_hook(keep(0))
    for number, layer in enumerate(tower.layers, 1):
        layer.register_forward_hook(keep(number))

    def prompt(text: str) -> str:
        if options.chat is None:
            return str(options.template.format(text=text))
        messages = [
            {"role": each.role, "content": each.content.format(text=text)}
            for each in options.chat.messages
        ]
        thinking = options.chat.thinking
        switch = {} if thinking is None else {"enable_thinking": thinking}
        ending = {"add_generation_prompt": options.chat.generation_prompt, **switch}
        return str(tokenize.apply_chat_template(messages, tokenize=False, **ending))

    start, special = options.crop_start, {"add_special_tokens": options.chat is None}
    if not isinstance(start, int):
        before = prompt("\0").split("\0")[0]
        offsets = tokenize(before, return_offsets_mapping=True, **special)["offset_mapping"]
        ends = [place for place, (begin, end) in enumerate(offsets, 1) if begin < end]
        start = max(ends, default=0) - int(start.partition("-")[2] or 0)
    cut = {"truncation": True, "max_length": start + options.max_length - options.keep_first}

    def encode(text: str, padded_length: int | None) -> dict[str, torch.Tensor]:
        pads = {"padding": "max_length", "padding_side": options.padding_side}
        more = {**special, **cut, **(pads if padded_length is not None else {})}
        inputs = tokenize(prompt(text), return_tensors="pt", **more).to(device)
        real = inputs.attention_mask.bool()
        mask = {"attention_mask": real} if options.attention_mask == "padding" else {}
        with torch.no_grad():
            model(input_ids=inputs.input_ids, **mask)
            taken = [states[layer % len(states)] for layer in options.layers]
            if options.norm == "final":
                taken[-1] = tower.norm(taken[-1])
            values = readout(taken, real, options)
        end = len(values) - options.crop_end
        return {"": torch.cat([values[: options.keep_first], values[start:end]])}

    return encode


def readout(taken: list[torch.Tensor], real: torch.Tensor, options: Any) -> torch.Tensor:
    """[L, stored width] of the layers' outputs, each [1, L, D]; computed in float32."""
    states, project = torch.cat(taken).float(), options.project  # [K, L, D]
    if options.layer_zscore:
        deviation, mean = torch.std_mean(states, dim=-1, keepdim=True)
        states = (states - mean) / (deviation + 1e-8)
    if project is not None and project.before == "ltx2_range":
        seen = states[:, real[0]].flatten(1)  # [K, real tokens x D]
        mean, span = seen.mean(1), seen.amax(1) - seen.amin(1)
        states = 8 * (states - mean[:, None, None]) / (span[:, None, None] + 1e-6)
        states = states * real[0, :, None]
    if project is not None and project.before == "rms":
        states = states / (states.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        states = states * real[0, :, None]
    order = "k l d -> l (k d)" if options.combine == "concat" else "k l d -> l (d k)"
    values = einops.rearrange(states, order)
    if project is not None:
        width = states.shape[2]
        folder = Path(project.path)
        files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else [folder]
        found: dict[str, torch.Tensor] = {}
        for file in files:
            with safe_open(file, "pt", device=str(values.device)) as opened:
                found |= {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        matrix = found[project.weight].float()
        if project.before == "rms":
            values = values * (matrix.shape[0] / width) ** 0.5
        values = values @ matrix.T
        if project.bias not in (None, "none"):
            values = values + found[project.bias].float()
    return values.to(taken[0].dtype)
