"""Every implementation on this machine, tried with tiny random models.

Guarantees: no network is asked, and an error of one does not hide the others.
Costs: a few seconds, and up to half a minute for each that is compiled. This process computes with
one thread from then on.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from embed_precompute.encoders import device
from embed_precompute.encoders.checkpoint import quiet_transformers
from embed_precompute.encoders.families import FAMILIES
from embed_precompute.encoders.resolve import open_encoder, resolve
from embed_precompute.errors import one_line
from embed_precompute.steps import steps

SPECIAL = ("<pad>", "<unk>", "<start>", "<end>")
POSITIONS = 77
VOCABULARY = len(SPECIAL) + 256
IDS = {"pad_token_id": 0, "bos_token_id": 2, "eos_token_id": 3}
"""Never 2 for the end: CLIP would pool at the highest id."""
SIZES = {
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": POSITIONS,
}
MODELS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "t5": (
        "T5Config",
        "T5EncoderModel",
        {"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 2, "num_heads": 4}
        | {"feed_forward_proj": "gated-gelu"},
    ),
    "clip": ("CLIPTextConfig", "CLIPTextModel", SIZES),
    "decoder": ("LlamaConfig", "LlamaModel", {**SIZES, "num_key_value_heads": 2}),
}
"""Kind -> transformers' config, its text encoder, and their sizes."""
OPTIONS: dict[str, tuple[dict[str, Any], ...]] = {
    "t5": ({"attention_mask": "none"}, {"attention_mask": "padding"})
}
"""Kind -> options that each implementation is tried with; compiled with the last."""


class Trial(NamedTuple):
    """What came of an implementation."""

    what: str
    """Kind of encoder and implementation."""
    compiled: bool
    where: str
    """Device and dtype."""
    problem: str | None
    """None: it computes what transformers does."""


def try_implementations() -> Iterator[Trial]:
    """A tiny model of each family through each implementation, compared with transformers' own."""
    torch.set_num_threads(1)  # tiny models gain nothing from more, and threads that spin cost
    here = device.resolve_device("auto")
    dtype = "float32" if here == "cpu" else "bfloat16"
    ways = [(kind, name, False) for kind in MODELS for name in FAMILIES[kind].implementations]
    ways = [way for way in ways if way[1] != "shardformer" or find_spec("colossalai")]
    ways += [(kind, "fused", True) for kind in MODELS]
    with tempfile.TemporaryDirectory() as folder:
        for kind, name, compiled in steps(ways, len(ways), "trying implementations", ""):
            problem = None
            every = OPTIONS.get(kind, ({},))
            try:
                path = Path(folder, kind)
                if not path.exists():
                    write_tiny(kind, path)
                for options in every[-1:] if compiled else every:
                    fields = {"kind": kind, "pretrained": str(path), "max_length": POSITIONS}
                    fields |= {"implementation": name, "compile": compiled, "dtype": dtype}
                    given = FAMILIES[kind].options(**{**fields, **options})
                    encoder = resolve(open_encoder(kind, given))
                    device.check_machine(here, here, [encoder])
                    device.start(encoder, here, "float32", "always")
            except Exception as error:  # of torch, of a compiler, of a kernel: of many kinds
                problem = f"{type(error).__name__}: {one_line(error)[:400]}"
            what = f"{kind} {name}{', compile true' if compiled else ''}"
            yield Trial(what, compiled, f"{here} in {dtype}", problem)


def write_tiny(kind: str, folder: Path) -> Path:
    """Write a float32 checkpoint of a family, with a tokenizer of bytes; returns `folder`."""
    config_name, model_name, sizes = MODELS[kind]
    library: Any = transformers
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    around = {"t5": "$A <end>", "clip": "<start> $A <end>", "decoder": "<start> $A"}[kind]
    special = [(token, vocabulary[token]) for token in SPECIAL]
    tokenizer.post_processor = processors.TemplateProcessing(around, None, special)
    with quiet_transformers(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = getattr(library, config_name)(vocab_size=VOCABULARY, **IDS, **sizes)
        getattr(library, model_name)(config).save_pretrained(str(folder))
        library.PreTrainedTokenizerFast(
            tokenizer_object=tokenizer,
            **{"pad_token": "<pad>", "bos_token": "<start>"},
            **{"eos_token": "<end>", "unk_token": "<unk>"},
        ).save_pretrained(str(folder))
    return folder
