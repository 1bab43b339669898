"""Print how far each preset is from the text encoding of the pipeline that it follows.

Guarantees: what we are compared with is diffusers' own method, called on an object that has tiny
encoders and tokenizers and nothing else, one caption at a time. The presets are the files that
ship, with their own lengths, templates and layers; only checkpoints and cropped positions are
replaced.
Costs: some minutes on two cores. Nothing is downloaded. Needs diffusers (the extra `dev`).

    python scripts/presets_table.py [NAME ...] [--captions 30]
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import inspect
import re
import tempfile
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from safetensors.torch import load_file

from embed_precompute.config.files import load_config, preset_path
from embed_precompute.encoders.checkpoint import quiet_transformers
from embed_precompute.encoders.encoder import build
from embed_precompute.encoders.families.base import EncoderConfig
from embed_precompute.encoders.resolve import ResolvedEncoder, open_encoder, resolve
from make_demo import demo_captions, write_clip, write_t5
from preset_checkpoints import (
    CONNECTOR,
    GEMMA3_LAYERS,
    write_byt5,
    write_gemma2,
    write_llama,
    write_ltx2,
    write_projected_clip,
    write_qwen3,
    write_qwen_vl,
)

Write = Callable[[Path, Sequence[str]], Path]
Kept = tuple[torch.Tensor, "torch.Tensor | None"]
"""What a pipeline hands to its model: values [L, D] or [C]; which positions count, None: all."""
Encode = Callable[[str], dict[str, Kept]]
"""Caption -> tensor's name -> what the pipeline makes of it."""

OLDEST = (0, 42)
"""The release of diffusers that the presets follow. ColossalAI pins 0.29, with few pipelines, of
which SD3's has another length for T5."""
CAPTIONS = (
    "",
    "A red fox runs through shallow water, cinematic lighting, 35mm film grain.",
    "A slow tracking shot follows an old fisherman along the harbour at dawn. " * 50,
    "빨간 우산을 쓴 여성이 비 오는 거리를 걷는다",
    'A neon sign that says "OPEN 24h", and a smaller one: \u201cno vacancy\u201d.',
    "  Tom &amp;amp; Jerry &lt;b&gt;run&lt;/b&gt;\n\n at   https://example.com/a?b=c  #42 ",
    "一只黑猫在雪地里奔跑，电影感镜头",
    " ",
    "a",
    "赤い傘の女性が駅前を歩く。ＡＢＣ　１２３",
    "рыжая лиса бежит по мелководью",
    "مرحبا بالعالم، ثعلب أحمر",
    "नमस्ते दुनिया में एक लाल लोमड़ी",
    "αλεπού τρέχει στο νερό",
    "สุนัขจิ้งจอกสีแดงวิ่งผ่านน้ำตื้น",
    "🔥 👩‍🚀 🇫🇷 ❤️ 𝕏",
    "UPPER lower MiXeD 4K HDR x264 24.0 FPS, 7 motion score.",
    "it's they'll we've I'm \u2018single\u2019 \u2014 dash \u2013 more\u2026 caf\u00e9 cafe\u0301",
    "tabs\tand\r\nnew lines, zero\u200bwidth \u00ad soft \x07 bell",
    "schÃ¶n und â€œgoodâ€\u009d, mojibake of two encodings",
    "contact: someone@example.org or @handle, file_name_123.jpg 1920x1080",
    'two "signs" and the same "signs" again, "third one"',
    "A woman in a yellow raincoat walks along a pier. The camera pans left. Fog. " * 12,
    "antidisestablishmentarianism zzqxjkvw qqqqqqqqqqqqq",
    "50% $9.99 #1 a_b c/d e\\f {braces} [brackets] (round) <angle>",
    "x " * 700,
    "An astronaut rides a horse on Mars, dust in the air, low sun, wide shot",
    "Ein Fuchs läuft durch seichtes Wasser; Übergänge, Straße, naïve, Ångström",
    "The quick brown fox jumps over the lazy dog while it rains. " * 4,
    "an end\n",
)
"""The first are the ones that tell most: empty, plain, over-long, not Latin, quoted, unclean."""


class NotHereError(Exception):
    """There is no diffusers to compare with, or an old one."""


@dataclasses.dataclass(frozen=True)
class Preset:
    """How a preset is compared with its pipeline."""

    theirs: Callable[[Mapping[str, Path]], Encode]
    """Folders of the encoders, by name -> the pipeline's own encoding."""
    writes: Mapping[str, Write]
    """Encoder -> what makes its tiny checkpoint."""
    changes: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    """Options that a tiny model needs otherwise: fewer layers, say; by encoder."""
    pads_left: bool = False
    """The pipeline pads on the left, which the preset leaves out."""
    unpadded: bool = False
    """The pipeline pads nothing where there is one caption."""
    null: str = ""
    """The text whose encoding the null embedding is."""


@dataclasses.dataclass(frozen=True)
class Row:
    """One stored tensor of a preset; differences are max|a - b| / max|b|, 0 for equal bits."""

    preset: str
    tensor: str
    captions: int
    shape: tuple[int, ...]
    """[positions, width] that the pipeline hands on, or [width]."""
    hf: float
    fused: float | None
    """None: this encoder has no fused layers."""
    implementation: str
    """What `auto` chooses."""


# -- the pipelines ---------------------------------------------------------------------------------


def pipeline(name: str, **parts: Any) -> Any:
    """An object of diffusers' class with nothing but these attributes."""
    import diffusers

    diffusers.utils.logging.set_verbosity_error()
    made = object.__new__(getattr(diffusers, name))
    made.__dict__.update(parts)
    return made


def source_of(pipeline_class: type) -> str:
    """The text of the module: some templates are set where an object is made."""
    return Path(str(inspect.getsourcefile(pipeline_class))).read_text(encoding="utf-8")


def model(name: str, folder: Path) -> Any:
    with quiet_transformers():
        loaded = getattr(transformers, name).from_pretrained(str(folder)).eval()
    for weight in loaded.parameters():  # a caption of one token: its bits depend on alignment
        weight.data = weight.data.clone()
    return loaded


def tokenizer(folder: Path) -> Any:
    tokenize = transformers.AutoTokenizer.from_pretrained(str(folder))
    tokenize.model_max_length = 10**9  # nobody is told of long captions
    return tokenize


def t5_pipeline(
    name: str,
    folders: Mapping[str, Path],
    keep: Callable[..., Kept],
    *,
    model_name: str = "T5EncoderModel",
    **fixed: Any,
) -> Encode:
    """Of a pipeline with one T5 whose method is `_get_t5_prompt_embeds`."""
    ((encoder, folder),) = folders.items()
    parts = {"tokenizer": tokenizer(folder), "text_encoder": model(model_name, folder)}
    pipe = pipeline(
        name, **parts, _internal_dict=SimpleNamespace(force_zeros_for_empty_prompt=False)
    )
    method = partial(pipe._get_t5_prompt_embeds, device="cpu", **fixed)
    return lambda text: {encoder: keep(method([text]))}


def every(embeddings: torch.Tensor) -> Kept:
    """No mask: the model gets all positions."""
    return embeddings[0], None


def masked(found: tuple[torch.Tensor, torch.Tensor]) -> Kept:
    """The model gets a mask beside the embeddings."""
    return found[0][0], found[1][0].bool()


def not_zero(embeddings: torch.Tensor) -> Kept:
    """The pipeline has put zeros in the pads' places."""
    return embeddings[0], embeddings[0].ne(0).any(dim=-1)


def open_sora(folders: Mapping[str, Path]) -> Encode:
    """Not in diffusers: HFEmbedder of hpcaitech/Open-Sora in our words. Its slow CLIPTokenizer
    repairs a text with ftfy, which Open-Sora requires, and writes it in lower case."""
    import ftfy

    parts = {"t5": ("T5EncoderModel", 512), "clip": ("CLIPTextModel", 77)}
    tools = {n: (tokenizer(folders[n]), model(parts[n][0], folders[n])) for n in parts}

    def encode(text: str) -> dict[str, Kept]:
        found = {}
        small = re.sub(r"\s+", " ", ftfy.fix_text(text)).strip().lower()
        for name, (tokenize, encoder) in tools.items():
            ids = tokenize(
                [small if name == "clip" else text],
                truncation=True,
                max_length=parts[name][1],
                padding="max_length",
                return_tensors="pt",
            )["input_ids"]
            found[name] = encoder(input_ids=ids, attention_mask=None)
        return {
            "t5": every(found["t5"].last_hidden_state),
            "clip": every(found["clip"].pooler_output),
        }

    return encode


def flux(folders: Mapping[str, Path]) -> Encode:
    pipe = pipeline(
        "FluxPipeline",
        tokenizer=tokenizer(folders["clip"]),
        text_encoder=model("CLIPTextModel", folders["clip"]),
        tokenizer_2=tokenizer(folders["t5"]),
        text_encoder_2=model("T5EncoderModel", folders["t5"]),
        tokenizer_max_length=77,
    )
    return lambda text: {
        "t5": every(pipe._get_t5_prompt_embeds([text], device="cpu")),
        "clip": every(pipe._get_clip_prompt_embeds([text], device="cpu")),
    }


def sd3(folders: Mapping[str, Path]) -> Encode:
    """What encode_prompt makes of the three, taken apart again where it joined them."""
    names = {"": "clip_l", "_2": "clip_g", "_3": "t5"}
    parts: dict[str, Any] = {f"tokenizer{n}": tokenizer(folders[e]) for n, e in names.items()}
    for number, encoder in names.items():
        class_name = "T5EncoderModel" if encoder == "t5" else "CLIPTextModelWithProjection"
        parts[f"text_encoder{number}"] = model(class_name, folders[encoder])
    pipe = pipeline("StableDiffusion3Pipeline", **parts, tokenizer_max_length=77)

    def encode(text: str) -> dict[str, Kept]:
        joined, _, pooled, _ = pipe.encode_prompt(
            text, None, None, device="cpu", do_classifier_free_guidance=False
        )
        left, right = 32, 48  # the widths of the two CLIPs
        assert joined.shape == (1, 77 + 256, 128)
        assert not joined[0, :77, left + right :].any()
        assert pooled.shape == (1, left + right)
        return {
            "clip_l": (pooled[0, :left], None),
            "clip_l_hidden": (joined[0, :77, :left], None),
            "clip_g": (pooled[0, left:], None),
            "clip_g_hidden": (joined[0, :77, left : left + right], None),
            "t5": (joined[0, 77:], None),
        }

    return encode


def pixart(folders: Mapping[str, Path]) -> Encode:
    parts = {"tokenizer": tokenizer(folders["t5"])}
    pipe = pipeline(
        "PixArtSigmaPipeline", **parts, text_encoder=model("T5EncoderModel", folders["t5"])
    )
    settings = {"do_classifier_free_guidance": False, "device": "cpu", "clean_caption": True}
    return lambda text: {"t5": masked(pipe.encode_prompt(text, **settings)[:2])}


def hunyuan(folders: Mapping[str, Path]) -> Encode:
    from diffusers.pipelines.hunyuan_video import pipeline_hunyuan_video

    default: dict[str, Any] = pipeline_hunyuan_video.DEFAULT_PROMPT_TEMPLATE
    tokenize = tokenizer(folders["llama"])
    crop = len(tokenize(default["template"].split("{}")[0])["input_ids"])
    pipe = pipeline(
        "HunyuanVideoPipeline",
        tokenizer=tokenize,
        text_encoder=model("LlamaModel", folders["llama"]),
        tokenizer_2=tokenizer(folders["clip"]),
        text_encoder_2=model("CLIPTextModel", folders["clip"]),
    )

    def encode(text: str) -> dict[str, Kept]:
        template = {**default, "crop_start": crop}
        states, pooled, mask = pipe.encode_prompt(text, prompt_template=template, device="cpu")
        return {"llama": masked((states, mask)), "clip": every(pooled)}

    return encode


def hunyuan_1_5(folders: Mapping[str, Path]) -> Encode:
    from diffusers import HunyuanVideo15Pipeline as Pipeline

    (system,) = re.findall(r'system_message: str = "(.*?)",\n', source_of(Pipeline), re.DOTALL)
    system = system.replace("\\\n", "")
    tokenize = tokenizer(folders["qwen"])
    before = f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n"
    encoder = model("Qwen2_5_VLTextModel", folders["qwen"])
    byt5 = model("T5EncoderModel", folders["byt5"])
    byte_tokenizer = transformers.ByT5Tokenizer.from_pretrained(str(folders["byt5"]))
    crop = len(tokenize(before)["input_ids"])

    def encode(text: str) -> dict[str, Kept]:
        states = Pipeline._get_mllm_prompt_embeds(
            encoder, tokenize, text, "cpu", crop_start=crop, system_message=system
        )
        glyphs = Pipeline._get_byt5_prompt_embeds(byte_tokenizer, byt5, text, "cpu")
        return {"qwen": masked(states), "byt5": masked(glyphs)}

    return encode


def qwen_image(folders: Mapping[str, Path]) -> Encode:
    tokenize = tokenizer(folders["qwen"])
    name = "QwenImagePipeline"
    source = source_of(type(pipeline(name)))
    (template,) = re.findall(r'self\.prompt_template_encode = "(.*)"', source)
    template = template.replace("\\n", "\n")
    pipe = pipeline(
        name,
        tokenizer=tokenize,
        text_encoder=model("Qwen2_5_VLForConditionalGeneration", folders["qwen"]),
        tokenizer_max_length=1024,
        prompt_template_encode=template,
        prompt_template_encode_start_idx=len(tokenize(template.split("{}")[0])["input_ids"]),
    )
    return lambda text: {"qwen": masked(pipe._get_qwen_prompt_embeds([text], device="cpu"))}


def z_image(folders: Mapping[str, Path]) -> Encode:
    parts = {"tokenizer": tokenizer(folders["qwen"])}
    pipe = pipeline("ZImagePipeline", **parts, text_encoder=model("Qwen3Model", folders["qwen"]))
    return lambda text: {"qwen": (pipe._encode_prompt([text], device="cpu")[0], None)}


def sana(folders: Mapping[str, Path]) -> Encode:
    parts = {"tokenizer": tokenizer(folders["gemma"])}
    pipe = pipeline("SanaPipeline", **parts, text_encoder=model("Gemma2Model", folders["gemma"]))
    instruction = inspect.signature(type(pipe).__call__).parameters["complex_human_instruction"]
    settings = {"do_classifier_free_guidance": False, "device": "cpu"}
    settings |= {"complex_human_instruction": instruction.default}
    return lambda text: {"gemma": masked(pipe.encode_prompt(text, **settings)[:2])}


def lumina2(folders: Mapping[str, Path]) -> Encode:
    source = source_of(type(pipeline("Lumina2Pipeline")))
    (system,) = re.findall(r'self\.system_prompt = "(.*)"', source)
    parts = {"tokenizer": tokenizer(folders["gemma"]), "system_prompt": system}
    pipe = pipeline("Lumina2Pipeline", **parts, text_encoder=model("Gemma2Model", folders["gemma"]))
    settings = {"do_classifier_free_guidance": False, "device": "cpu"}
    return lambda text: {"gemma": masked(pipe.encode_prompt(text, **settings)[:2])}


def klein(folders: Mapping[str, Path]) -> Encode:
    method = pipeline("Flux2KleinPipeline")._get_qwen3_prompt_embeds
    tools = model("Qwen3ForCausalLM", folders["qwen"]), tokenizer(folders["qwen"])
    return lambda text: {"qwen": every(method(*tools, text))}


def ltx2(folders: Mapping[str, Path]) -> Encode:
    """The method's states through the first stage of diffusers' own connector, whose matrix is the
    preset's `project`."""
    from diffusers.pipelines.ltx2.connectors import LTX2TextConnectors

    parts = {"tokenizer": tokenizer(folders["gemma"])}
    encoder = model("Gemma3ForConditionalGeneration", folders["gemma"])
    pipe = pipeline("LTX2Pipeline", **parts, text_encoder=encoder)
    heads = {f"{name}_connector_num_attention_heads": 2 for name in ("video", "audio")}
    heads |= {f"{name}_connector_attention_head_dim": 16 for name in ("video", "audio")}
    connectors = LTX2TextConnectors(
        caption_channels=32, text_proj_in_factor=GEMMA3_LAYERS + 1, **heads
    )
    weight = load_file(folders["gemma"] / CONNECTOR)["text_proj_in.weight"]
    connectors.text_proj_in.weight.data = weight
    projected: list[torch.Tensor] = []
    connectors.text_proj_in.register_forward_hook(lambda _, given, out: projected.append(out))

    def encode(text: str) -> dict[str, Kept]:
        states, mask = pipe._get_gemma_prompt_embeds([text], device="cpu")
        connectors(states, mask, padding_side="left")
        return {"gemma": masked((projected.pop(), mask))}

    return encode


def minimax(folders: Mapping[str, Path]) -> Encode:
    from diffusers.modular_pipelines.minimax_h3 import encoders

    tokenize = tokenizer(folders["qwen"])
    encoder = model("Qwen3VLForConditionalGeneration", folders["qwen"])
    processor = SimpleNamespace(
        create_mm_token_type_ids=lambda lines: [[0] * len(line) for line in lines]
    )

    def encode(text: str) -> dict[str, Kept]:
        # An empty text has no token, and the pipeline fails; a space stands for it elsewhere.
        ids = tokenize(text or " ", add_special_tokens=False)["input_ids"]
        return {"qwen": every(encoders.get_qwen3vl_prompt_embeds(encoder, processor, ids))}

    return encode


t5, relu = write_t5, partial(write_t5, gated=False)
PRESETS: dict[str, Preset] = {
    "opensora_v2": Preset(open_sora, {"t5": t5, "clip": write_clip}),
    "flux1": Preset(flux, {"t5": t5, "clip": write_clip}),
    "sd35": Preset(
        sd3,
        {
            "clip_l": partial(write_projected_clip, width=32),
            "clip_g": partial(write_projected_clip, width=48, pad="!"),
            "t5": partial(t5, width=128),
        },
    ),
    "pixart_sigma": Preset(pixart, {"t5": t5}),
    "cogvideox": Preset(partial(t5_pipeline, "CogVideoXPipeline", keep=every), {"t5": t5}),
    "ltx_video": Preset(partial(t5_pipeline, "LTXPipeline", keep=masked), {"t5": t5}),
    "wan2": Preset(
        partial(
            t5_pipeline,
            "WanPipeline",
            keep=not_zero,
            model_name="UMT5EncoderModel",
            max_sequence_length=512,
        ),
        {"umt5": partial(t5, model_type="umt5")},
    ),
    "mochi": Preset(partial(t5_pipeline, "MochiPipeline", keep=masked), {"t5": t5}),
    "cosmos_predict2": Preset(
        partial(t5_pipeline, "Cosmos2TextToImagePipeline", keep=not_zero), {"t5": relu}
    ),
    "chroma": Preset(partial(t5_pipeline, "ChromaPipeline", keep=masked), {"t5": t5}),
    "hunyuan_video": Preset(hunyuan, {"llama": write_llama, "clip": write_clip}),
    "hunyuan_video_1_5": Preset(
        hunyuan_1_5,
        {"qwen": partial(write_qwen_vl, name="Qwen2_5_VLTextModel"), "byt5": write_byt5},
    ),
    "qwen_image": Preset(
        qwen_image,
        {"qwen": partial(write_qwen_vl, name="Qwen2_5_VLForConditionalGeneration")},
        unpadded=True,
    ),
    "z_image": Preset(z_image, {"qwen": partial(write_qwen3, layers=4)}),
    "sana": Preset(sana, {"gemma": write_gemma2}),
    "lumina2": Preset(lumina2, {"gemma": write_gemma2}),
    "flux2_klein": Preset(
        klein, {"qwen": partial(write_qwen3, layers=29, name="Qwen3ForCausalLM")}
    ),
    "ltx2": Preset(
        ltx2,
        {"gemma": write_ltx2},
        {"gemma": {"layers": tuple(range(GEMMA3_LAYERS + 1))}},
        pads_left=True,
    ),
    "minimax_h3": Preset(
        minimax,
        {"qwen": partial(write_qwen_vl, name="Qwen3VLForConditionalGeneration", layers=52)},
        unpadded=True,
        null=" ",
    ),
}


# -- the comparison --------------------------------------------------------------------------------


def options_of(preset: str, encoder: str, folder: Path, **changes: Any) -> EncoderConfig:
    """The preset's options with a tiny checkpoint, in float32; `changes` as in a YAML file."""
    options = load_config(preset_path(preset)).encoders[encoder]
    plain: dict[str, Any] = {"pretrained": str(folder), "tokenizer": None, "width": None}
    if getattr(options, "crop_start", 0) not in (0, "template-1"):
        plain["crop_start"] = "template"  # the tiny tokenizer counts otherwise
    if getattr(options, "project", None) is not None:
        project = {"path": str(folder / CONNECTOR)}
        plain["project"] = dataclasses.replace(options.project, **project)  # type: ignore[attr-defined]
    plain |= {"dtype": "float32", **PRESETS[preset].changes.get(encoder, {}), **changes}
    return dataclasses.replace(options, **plain)


def encoded(resolved: ResolvedEncoder, texts: Sequence[str]) -> dict[str, list[torch.Tensor]]:
    """Suffix -> what a job stores of each text and, last, of the null caption."""
    encoder, tokens = build(resolved, "cpu", "float32"), resolved.opened.tokenizer
    stored: dict[str, list[torch.Tensor]] = {output.suffix: [] for output in resolved.outputs}
    for captions, null in ((tokens.encode(list(texts)), False), (tokens.encode([""]), True)):
        lines: dict[str, dict[int, torch.Tensor]] = {suffix: {} for suffix in stored}
        for batch in resolved.batches(captions, null=null):
            for suffix, values in encoder.encode(batch).items():
                lines[suffix].update((row, values[i]) for i, row in enumerate(batch.rows.tolist()))
        for output in resolved.outputs:
            rows, nothing = lines[output.suffix], torch.zeros(0, output.width)
            stored[output.suffix] += [rows.get(row, nothing) for row in range(len(captions))]
    return stored


def exact(preset: str, options: EncoderConfig, texts: Sequence[str]) -> EncoderConfig:
    """hf at the pipeline's own shapes: one caption, at its full length or, where the pipeline pads
    nothing, at its own."""
    changes: dict[str, Any] = {"implementation": "hf"}
    names = {field.name for field in dataclasses.fields(options)}
    changes |= {name: 1 for name in ("batch_tokens", "batch_size") if name in names}
    if options.kind == "decoder" and not PRESETS[preset].unpadded:
        changes["attention_mask"] = "padding"
        changes["padding_side"] = "left" if PRESETS[preset].pads_left else "right"
    if getattr(options, "attention_mask", "") == "none" and options.kind == "t5":
        return dataclasses.replace(options, **changes)
    if "hidden" in getattr(options, "outputs", ()) or getattr(options, "keep", "") == "all":
        return dataclasses.replace(options, **changes)
    changes["buckets"] = ()
    if PRESETS[preset].unpadded:
        resolved = resolve(open_encoder("enc", options)).opened.tokenizer
        counts = resolved.encode([*texts, ""]).num_ids
        cropped = resolved.longest - options.max_length
        changes["buckets"] = tuple(sorted({count - cropped for count in counts}))
    return dataclasses.replace(options, **changes)


def difference(ours: Sequence[torch.Tensor], theirs: Sequence[Kept]) -> float:
    """max|a - b| / max|b| over all captions. Raises ValueError: other positions are kept."""
    worst = 0.0
    for number, (mine, (values, mask)) in enumerate(zip(ours, theirs, strict=True)):
        wanted = values if mask is None else values[mask]
        if mine.shape != wanted.shape:
            raise ValueError(f"caption {number}: {tuple(mine.shape)} for {tuple(wanted.shape)}")
        if wanted.numel():
            worst = max(worst, float((mine - wanted).abs().max() / wanted.abs().max()))
    return worst


def rows_of(name: str, folder: Path, texts: Sequence[str]) -> list[Row]:
    """The table's rows of one preset; its tiny checkpoints go to `folder`."""
    corpus: list[str] = demo_captions(200).column("text").to_pylist()
    preset = PRESETS[name]
    if not find_spec("ftfy") or not find_spec("bs4"):
        raise NotHereError("ftfy or beautifulsoup4 is not installed (the extra dev)")
    if preset.theirs is not open_sora:
        try:
            release = importlib.metadata.version("diffusers")
        except importlib.metadata.PackageNotFoundError as error:
            raise NotHereError("diffusers is not installed (the extra dev)") from error
        if tuple(map(int, release.split(".")[:2])) < OLDEST:
            raise NotHereError(f"diffusers {release} is installed: presets follow 0.42 and newer")
    folders = {part: write(folder / part, corpus) for part, write in preset.writes.items()}
    encode = preset.theirs(folders)
    with torch.no_grad():
        theirs = [encode(text) for text in [*texts, preset.null]]
    rows = []
    for encoder, checkpoint in folders.items():
        options = options_of(name, encoder, checkpoint)
        hf = encoded(resolve(open_encoder("enc", exact(name, options, texts))), texts)
        auto = resolve(open_encoder("enc", options))
        implementation = auto.decision.implementation
        fused_values = encoded(auto, texts) if implementation == "fused" else {}
        for suffix, ours in hf.items():
            tensor = encoder + suffix
            kept = [each[tensor] for each in theirs]
            fused = difference(fused_values[suffix], kept) if fused_values else None
            shape = tuple(kept[0][0].shape)
            rows.append(
                Row(name, tensor, len(texts), shape, difference(ours, kept), fused, implementation)
            )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description="Our presets against diffusers' pipelines.")
    parser.add_argument("names", nargs="*", metavar="NAME", help="presets (default: all)")
    parser.add_argument("--captions", type=int, default=len(CAPTIONS), help="(default: all 30)")
    arguments = parser.parse_args()
    import diffusers

    versions = f"diffusers {diffusers.__version__}, transformers {transformers.__version__}"
    print(f"{versions}, torch {torch.__version__}, CPU, float32")
    print("max|a - b| / max|b| against the pipeline; 0 where every bit is equal\n")
    print("| preset | tensor | captions | shape | hf | fused | auto is |")
    print("|---|---|---|---|---|---|---|")
    for name in arguments.names or PRESETS:
        with tempfile.TemporaryDirectory() as folder:
            try:
                rows = rows_of(name, Path(folder), CAPTIONS[: arguments.captions])
            except NotHereError as error:
                print(f"| {name} | {error} | | | | | |")
                continue
        for row in rows:
            numbers = ["-" if n is None else f"{n:.1e}" if n else "0" for n in (row.hf, row.fused)]
            shape = " x ".join(map(str, row.shape))
            cells = [row.preset, f"text_{row.tensor}", str(row.captions), shape, *numbers]
            print(f"| {' | '.join([*cells, row.implementation])} |", flush=True)


if __name__ == "__main__":
    main()
