"""`init`: the preset with the table's columns in it, which `plan` takes as it is."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.csv
import pyarrow.parquet as pq
import pytest
from jobs import call, expect

from embed_precompute.config.files import load_config, preset_path, preset_paths
from embed_precompute.config.starter import write_starter
from embed_precompute.errors import InputError

TABLE: dict[str, list[Any]] = {
    "video_id": ["007", "008"],
    "caption": ["a red fox", 'two cats, "asleep"'],
    "fps": [24.0, 30.5],
}


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def write_table(name: str, columns: dict[str, list[Any]]) -> str:
    table = pa.table(columns)
    if name.endswith(".jsonl"):
        lines = [json.dumps(row) + "\n" for row in table.to_pylist()]
        Path(name).write_text("".join(lines), encoding="utf-8")
    elif name.endswith(".csv"):
        pyarrow.csv.write_csv(table, name)
    else:
        pq.write_table(table, name)
    return name


@pytest.mark.parametrize("name", [path.stem for path in preset_paths()])
def test_nothing_else_of_a_preset_changes(name: str) -> None:
    write_starter(name, write_table("my captions: #1.parquet", TABLE))
    preset, made = load_config(name), load_config(f"{name}.yaml")
    given = {"path": "my captions: #1.parquet", "text_column": "caption", "id_column": "video_id"}
    recipe: Any = preset.captions.recipe
    if name == "opensora_v2":
        recipe = replace(recipe, motion_column=None)
    assert made == replace(preset, captions=replace(preset.captions, recipe=recipe, **given))
    text = Path(f"{name}.yaml").read_text("utf-8")
    assert "# Columns of my captions: #1.parquet: video_id (string), caption (string), fps" in text
    for line in preset_path(name).read_text("utf-8").splitlines():
        if "#" in line and "captions.parquet" not in line:
            assert line.partition("#")[2] in text


@pytest.mark.parametrize("ending", ["csv", "jsonl", "parquet"])
def test_plan_takes_it_as_it_is(ending: str, tiny_t5: Path, tiny_clip: Path) -> None:
    for owner, folder in (
        ("google/t5-v1_1-xxl", tiny_t5),
        ("openai/clip-vit-large-patch14", tiny_clip),
    ):
        shutil.copytree(folder, owner)
    said = expect(0, "init", "opensora_v2", write_table(f"c.{ending}", TABLE))
    assert said.splitlines() == [
        "opensora_v2.yaml: written",
        "  captions: column caption",
        "  ids: column video_id",
        "  recipe: fps_column fps",
        "  recipe: motion_column null, for there is no column score_vmafmotion of numbers",
        "next: embed-precompute plan opensora_v2.yaml",
    ]
    widths = ("--encoders.t5.width", "null", "--encoders.clip.width", "null")  # they are tiny
    said = expect(0, "plan", "opensora_v2.yaml", *widths)
    assert "a red fox 24 FPS." in said


def test_comments_stand_below_each_other() -> None:
    write_starter("opensora_v2", write_table("c.parquet", TABLE))
    written = Path("opensora_v2.yaml").read_text("utf-8").splitlines()
    motion = next(line for line in written if line.startswith("    motion_column: null"))
    kind = next(line for line in written if line.startswith("    kind: opensora"))
    assert motion.index("#") == kind.index("#")


def test_a_float32_frame_rate_is_said() -> None:
    """Its digits are in the text: those that pandas gives Open-Sora's dataset class, too."""
    table = pa.table({"text": ["a"], "fps": pa.array([23.976], pa.float32())})
    pq.write_table(table, "c.parquet")
    digits = f"{pd.read_parquet('c.parquet').iloc[0].to_dict()['fps']} FPS"
    assert f"fps_column fps. It is float32: 23.976 gives {digits}" in str(
        write_starter("opensora_v2", "c.parquet")
    )


@pytest.mark.parametrize(
    ("columns", "text", "sample_id"),
    [
        ({"id": [1], "text": ["a"], "caption": ["b"]}, "text", "id"),
        ({"Caption": ["b"], "path": ["a"], "clip_id": ["x"]}, "Caption", "path"),
        ({"uuid": ["x"], "long": ["b"], "fps": [1.0]}, "long", "uuid"),
        ({"captions": [["a", "b"]], "id": [1.5]}, "captions", None),
        ({"on": ["b"]}, "on", None),
        ({"path": ["x"], "words": ["a"]}, "words", "path"),
    ],
)
def test_which_columns(columns: dict[str, list[Any]], text: str, sample_id: str | None) -> None:
    write_starter("wan2", write_table("c.parquet", columns), Path("new/my.yaml"))
    captions = load_config("new/my.yaml").captions
    assert (captions.text_column, captions.id_column) == (text, sample_id)


@pytest.mark.parametrize(
    ("columns", "said"),
    [
        ({"id;caption": ["a;b"]}, "its columns seem to be separated by ';'. Write it with commas"),
        ({"id": [1], "short": ["a"], "long": ["b"]}, "and short, long may be it. Rename"),
        ({"id": [1], "n": [1.5]}, "and no other holds text. Rename"),
    ],
)
def test_a_column_is_never_guessed(columns: dict[str, list[Any]], said: str) -> None:
    with pytest.raises(InputError, match=said):
        write_starter("wan2", write_table("c.parquet", columns))
    assert not Path("wan2.yaml").exists()


def test_mistakes_are_one_line() -> None:
    write_table("c.csv", TABLE)
    assert "did you mean wan2?" in expect(2, "init", "wan", "c.csv")
    assert "does not exist" in expect(2, "init", "wan2", "no.csv")
    (code, said, _) = call("init", "wan2", "c.csv")
    assert code == 0
    assert said.splitlines()[-2:] == [
        "next: embed-precompute fetch wan2.yaml",
        "then: embed-precompute plan wan2.yaml",
    ]
    Path("wan2.yaml").write_text("mine")
    assert "is there already, and nothing was written" in expect(2, "init", "wan2", "c.csv")
    assert Path("wan2.yaml").read_text() == "mine"


def test_other_text_is_named() -> None:
    said = write_starter(
        "wan2", write_table("c.csv", {"id": ["1"], "caption": ["a"], "tags": ["b"]})
    )
    assert said[1] == "  captions: column caption; other text, not taken: tags"


def test_the_dataset_is_never_inside_the_captions(tmp_path: Path) -> None:
    write_table("c.parquet", TABLE)
    write_starter("wan2", ".")
    assert load_config("wan2.yaml").output.path == f"{tmp_path}-embeddings"
