"""Presets: what is listed is what is stored, each names its source, and a name is enough to run."""

from __future__ import annotations

import hashlib
import inspect
import re
from pathlib import Path

import pytest
from jobs import call, expect, write_captions, write_job

from embed_precompute.config.files import load_config, preset_path, preset_paths
from embed_precompute.job import estimate

REFERENCE = re.compile(r"([\w.-]+/[\w.-]+)@(v[\d.]+|[0-9a-f]{40}) (\S+\.py):(\d+)")
MODELS = {
    *("opensora_v2", "flux1", "sd35", "pixart_sigma", "cogvideox", "ltx_video", "wan2", "mochi"),
    *("cosmos_predict2", "chroma", "hunyuan_video", "hunyuan_video_1_5", "qwen_image", "z_image"),
    *("sana", "lumina2", "flux2_klein", "ltx2", "minimax_h3"),
}
TEMPLATES = {
    "hunyuan_video": (512, "a52f68dde3637b12"),
    "hunyuan_video_1_5": (477, "547f3e99c78b2d9b"),
    "qwen_image": (215, "0194d360a674d2f1"),
    "sana": (1057, "48290080bb4fd4a2"),
    "lumina2": (148, "a6b3e2fd321386e3"),
}
"""Length and 16 hex of the sha256 of the prompts as their sources have them: the whole with {} for
the caption, or what stands before it alone."""


def test_the_presets_are_those_with_a_source() -> None:
    assert {path.stem for path in preset_paths()} == MODELS
    for path in preset_paths():
        for name, options in load_config(path).encoders.items():
            assert REFERENCE.fullmatch(str(options.reference)), (path.stem, name)
            assert options.width is not None, (path.stem, name)


@pytest.mark.parametrize("name", sorted(MODELS))
def test_a_source_is_where_the_preset_says(name: str) -> None:
    """In the release of diffusers that is named: the line begins the function."""
    diffusers = pytest.importorskip("diffusers")
    root = Path(str(inspect.getsourcefile(diffusers))).parents[1]
    for options in load_config(preset_path(name)).encoders.values():
        found = REFERENCE.fullmatch(str(options.reference))
        assert found is not None
        repository, release, path, line = found.groups()
        if (repository, release) != ("huggingface/diffusers", f"v{diffusers.__version__}"):
            pytest.skip(f"{repository}@{release} is not installed")
        text = (root / path.removeprefix("src/")).read_text(encoding="utf-8")
        assert re.match(r" *def \w*(encode|prompt|text)\w*\(", text.splitlines()[int(line) - 1])


def test_templates_are_the_sources_own() -> None:
    for name, (length, digest) in TEMPLATES.items():
        options = next(iter(load_config(preset_path(name)).encoders.values()))
        chat, template = getattr(options, "chat", None), getattr(options, "template", "")
        text = chat.messages[0].content if chat else template.replace("{text}", "{}")
        if name in ("sana", "lumina2"):
            text = text.removesuffix("{}").removesuffix(" <Prompt Start> ")
        assert (len(text), hashlib.sha256(text.encode()).hexdigest()[:16]) == (length, digest), name


def test_the_table() -> None:
    out = expect(0, "presets")
    rows = {line.split()[0]: line for line in out.splitlines() if line[:1].strip()}
    assert set(rows) >= MODELS
    assert re.search(r"text_umt5 +real, up to 512 x 4096 +4,194,304 +8,192 +Wan-AI", rows["wan2"])
    assert "real and 1 pad, up to 512 x 4096" in rows["chroma"]
    assert re.search(r"text_t5 +all 226 x 4096 +1,851,392 +8,192 ", rows["cogvideox"])
    assert re.search(r"text_clip_g +a vector of 1280 +2,560 +stabilityai\S+_2 ", out)
    assert re.search(r"\.\.\./pipeline_chroma.py:\d+$", rows["chroma"])


@pytest.mark.parametrize("name", sorted(MODELS))
def test_one_preset_is_a_configuration(name: str, tmp_path: Path) -> None:
    path = tmp_path / "job.yaml"
    path.write_text(expect(0, "presets", name), encoding="utf-8")
    config = load_config(path)
    assert config == load_config(name) == load_config(preset_path(name))
    assert all(str(each.reference) in path.read_text() for each in config.encoders.values())


def test_a_name_is_enough_to_run(
    tmp_path: Path, tiny_t5: Path, corpus: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    captions, out = write_captions(tmp_path / "c.parquet", corpus[:5]), tmp_path / "out"
    words = ["--captions.path", str(captions), "--output.path", str(out)]
    words += ["--encoders.t5.pretrained", str(tiny_t5), "--encoders.t5.tokenizer", "null"]
    said = expect(2, "plan", "cogvideox", *words)
    assert "encoders.t5.width is 4096" in said
    assert not out.exists()
    expect(0, "run", "cogvideox", *words, "--encoders.t5.width", "null")
    expect(0, "verify", str(out))
    # A dataset of that name is in nobody's way; a name that is none says where names are.
    monkeypatch.chdir(out.parent)
    out.rename("cogvideox")
    words[3] = "cogvideox"
    assert "nothing to do" in expect(0, "run", "cogvideox", *words, "--encoders.t5.width", "null")
    assert "presets` lists them" in expect(2, "plan", "cogvideo")
    assert "did you mean cogvideox?" in expect(2, "presets", "cogvideo")
    assert "did you mean wan2?" in expect(2, "presets", "wan")


def test_plan_tells_the_bytes_of_a_caption(
    tmp_path: Path, tiny_t5: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    captions = write_captions(tmp_path / "c.parquet", ["a red fox", "a dog"])
    job = write_job(tmp_path, captions, tiny_t5, None, reference="me/mine@v1 a.py:1")
    said = expect(0, "plan", str(job))
    assert "6.00 KiB a caption; as in me/mine@v1 a.py:1" in said  # 24 x 64 x 4 bytes
    assert "a disk delivers" not in said
    monkeypatch.setattr(estimate, "HEAVY_BYTES", 6000)
    _, said, _ = call("plan", str(job))
    assert "WARNING    6.00 KiB a caption: more than a disk" in said
    assert "`project`" in said
    assert "`layers`" in said
