"""The export for Open-Sora: tensor files, nulls, table, what is printed and what is refused."""

from __future__ import annotations

import importlib
import logging
import os
import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from breaking import flip
from jobs import call, dataset_bytes, expect, write_job
from opensora_case import NULL_ROWS, RECIPE, ROWS, captions_table, make, with_column

from embed_precompute import EmbeddingDataset
from embed_precompute.errors import (
    ConflictError,
    IncompleteError,
    InputError,
    StorageError,
    VerificationError,
)
from embed_precompute.opensora import export as export_module
from embed_precompute.opensora.dataset import REGISTERED_NAME
from embed_precompute.opensora.export import (
    Export,
    OpenSoraOptions,
    TensorFiles,
    export_opensora,
)
from embed_precompute.opensora.table import NO_LATENTS, Entry
from embed_precompute.store.records import read_json


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, tiny_t5: Path, tiny_clip: Path) -> Path:
    """seq_align 4 with 3 added tokens: samples have 25 vectors, the null embedding 24."""
    folder = tmp_path_factory.mktemp("export")
    fields = {"seq_align": 4, "added_tokens": 3}
    return make(folder, captions_table(), tiny_t5, tiny_clip, *RECIPE, **fields)


@pytest.fixture(scope="module")
def masked(tmp_path_factory: pytest.TempPathFactory, tiny_t5: Path, tiny_clip: Path) -> Path:
    folder = tmp_path_factory.mktemp("masked")
    return make(folder, captions_table(), tiny_t5, tiny_clip, attention_mask="padding")


def export(root: Path, out: Path, **options: Any) -> Export:
    return export_opensora(root, out, OpenSoraOptions(**options))


def rows_of(out: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(out / "table.parquet").to_pylist()
    return rows


def load(path: str | Path) -> torch.Tensor:
    loaded: torch.Tensor = torch.load(path, map_location="cpu", weights_only=True)
    return loaded


def check_tensors(root: Path, rows: list[dict[str, Any]]) -> None:
    """Each row's files against the dataset, bit for bit, with storage of their own."""
    dataset = EmbeddingDataset(root, "rows")
    for row in rows:
        sample = dataset[dataset.index_of(row["sample_id"])]
        for name in ("text_t5", "text_clip"):
            values = load(row[f"{name}_path"])
            assert torch.equal(values, sample[name])
            assert values.untyped_storage().nbytes() == values.nbytes
            assert os.path.getsize(row[f"{name}_path"]) < values.nbytes + export_module.PT_BYTES


# --- tensors and table ----------------------------------------------------------------------------


def test_every_sample_and_the_table(root: Path, tmp_path: Path) -> None:
    done = export(root, tmp_path / "exported")
    rows = rows_of(tmp_path / "exported")
    assert [row["id"] for row in rows] == [f"s{i}" for i in range(ROWS) if i not in NULL_ROWS]
    check_tensors(root, rows)
    source = {row["id"]: row for row in captions_table().to_pylist()}
    dataset = EmbeddingDataset(root)
    for row in rows:
        assert (row["sample_id"], row["latents_path"]) == (row["id"], NO_LATENTS)
        for name in set(source[row["id"]]) - {"text_t5_path"}:
            assert row[name] == source[row["id"]][name]
        encoded = dataset.encoded_text(dataset.index_of(row["id"]))
        assert encoded == f"{row['text']} {row['fps']} FPS."
    assert done.counts == {"rows": 28, "files": 56, "written": 56}
    assert done.captions.not_ok == {"null_text": 2}
    assert done.table.replaced == ["text_t5_path"]
    schema = pq.read_schema(tmp_path / "exported" / "table.parquet")
    assert schema.metadata is None
    assert schema.field("fps").type == pa.float64()  # as pandas saw it, when "15.0 FPS" was encoded


def test_several_processes_write_the_same(root: Path, tmp_path: Path) -> None:
    done = export(root, tmp_path / "exported", workers=2)
    assert done.counts == {"rows": 28, "files": 56, "written": 56}
    check_tensors(root, rows_of(tmp_path / "exported"))


def test_folders_are_bounded() -> None:
    some: Any = SimpleNamespace(out=Path("e"))
    names = {0: "000/000", 999: "000/000", 1000: "000/001", 12_345_678: "012/345"}
    for number, name in names.items():
        path = TensorFiles.path(some, "text_t5", Entry(number, 0, "", 0, ""))
        assert path == f"e/text_t5/{name}/{number:09d}.pt"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_nulls_are_in_the_trainers_dtype(root: Path, tmp_path: Path, dtype: Any) -> None:
    export(root, tmp_path / "e", trainer_dtype=dtype, table_only=True)
    null = EmbeddingDataset(root).null
    assert null["text_t5"].shape[0] == 24
    for name in ("t5", "clip"):
        values = load(tmp_path / "e" / f"null_{name}.pt")
        assert torch.equal(values, null[f"text_{name}"][None].to(getattr(torch, dtype)))
    assert not (tmp_path / "e" / "text_t5").exists()
    assert set(rows_of(tmp_path / "e")[0]) >= {"sample_id", "latents_path"}
    assert "text_clip_path" not in rows_of(tmp_path / "e")[0]


@pytest.mark.parametrize("rule", ["zeros", "repeat_last"])
def test_masked_datasets_are_padded_by_a_named_rule(
    masked: Path, tmp_path: Path, rule: Any
) -> None:
    with pytest.raises(InputError, match="attention_mask padding"):
        export(masked, tmp_path / "e")
    export(masked, tmp_path / "e", pad_masked=rule)
    dataset = EmbeddingDataset(masked)
    for row in rows_of(tmp_path / "e"):
        real = dataset[dataset.index_of(row["sample_id"])]["text_t5"]
        values = load(row["text_t5_path"])
        assert values.shape[0] == 24
        assert torch.equal(values[: len(real)], real)
        tail = torch.zeros_like(real[-1]) if rule == "zeros" else real[-1]
        assert all(torch.equal(value, tail) for value in values[len(real) :])
    assert load(tmp_path / "e" / "null_t5.pt").shape[1] == 24


def test_lists_are_a_row_per_caption(tmp_path: Path, tiny_t5: Path, tiny_clip: Path) -> None:
    """Also where a limit cut the last list."""
    lists = [["one  cat", "two cats"], [], None, ["a dog", None, "a dog on a hill"]] * 4
    table = pa.table({"id": list(range(16)), "takes": pa.array(lists, pa.list_(pa.string()))})
    words = ("--captions.text_column", "takes", "--captions.normalize", "[whitespace]")
    root = make(tmp_path, table, tiny_t5, tiny_clip, *words, "--limit", "12")
    export(root, tmp_path / "e")
    rows = rows_of(tmp_path / "e")
    ids = ["0#0", "0#1", "3#0", "3#2", "4#0", "4#1", "7#0", "7#2"]
    assert [row["sample_id"] for row in rows] == ids[: len(rows)]
    assert len(rows) == 7
    assert [row["text"] for row in rows[:4]] == ["one cat", "two cats", "a dog", "a dog on a hill"]
    assert [row["takes"] for row in rows] == [row["text"] for row in rows]
    check_tensors(root, rows)


def test_several_files_with_other_columns(tmp_path: Path, tiny_t5: Path, tiny_clip: Path) -> None:
    folder = tmp_path / "captions"
    folder.mkdir()
    for k in range(2):
        table = captions_table().slice(k * 15, 15)
        if k:
            table = with_column(table.drop_columns(["tags"]), "extra", range(15))
        pq.write_table(table, folder / f"{k}.parquet")
    job = write_job(tmp_path, folder, tiny_t5, tiny_clip)
    assert call("run", str(job))[0] == 0
    export(tmp_path / "out", tmp_path / "e")
    rows = rows_of(tmp_path / "e")
    assert (rows[0]["extra"], rows[0]["tags"]) == (None, [])
    assert (rows[-1]["extra"], rows[-1]["tags"]) == (14, None)
    check_tensors(tmp_path / "out", rows)


# --- reruns ---------------------------------------------------------------------------------------


def tensor_files(out: Path) -> dict[str, bytes]:
    return {name: held for name, held in dataset_bytes(out).items() if name.endswith(".pt")}


def test_a_rerun_writes_what_is_missing_or_differs(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "e"
    export(root, out)
    content = tensor_files(out)
    files = [path for path in sorted(out.rglob("*.pt")) if path.parent != out]
    before = {path: path.stat().st_mtime_ns for path in files}
    files[3].unlink()
    for path, damage in ((files[9], b"\x80"), (files[40], b"")):
        path.write_bytes(path.read_bytes()[:-700] + damage)
    torch.save(torch.zeros(2), files[17])
    assert (done := export(root, out)).counts["written"] == 4
    assert done.counts["files"] == len(files) == 56
    assert tensor_files(out) == content
    changed = {path for path, was in before.items() if path.stat().st_mtime_ns != was}
    assert changed == {files[k] for k in (3, 9, 17, 40)}
    assert export(root, out).counts["written"] == 0


def test_interrupted_anywhere(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(root, tmp_path / "whole")
    out = tmp_path / "e"
    replace_bytes = export_module.replace_bytes
    for stop_after in (1, 9, 25, 23):  # at a null, at tensor files, at export.json
        written: list[Path] = []

        def replace(path: Path, payload: bytes, n: int = stop_after, done: Any = written) -> Any:
            done.append(path)
            if len(done) > n:
                raise StorageError(f"{path}: no space")
            return replace_bytes(path, payload)

        monkeypatch.setattr(export_module, "replace_bytes", replace)
        with pytest.raises(StorageError):
            export(root, out)
        monkeypatch.undo()
        assert not (out / "export.json").exists()
        assert not list(out.rglob(".tmp-*"))
    export(root, out)
    assert tensor_files(out) == tensor_files(tmp_path / "whole")
    assert read_json(out / "export.json", "export")["rows"] == 28
    check_tensors(root, rows_of(out))


def test_a_limit_may_grow(root: Path, tmp_path: Path) -> None:
    assert export(root, tmp_path, limit=5).counts["written"] == 10
    assert [row["id"] for row in rows_of(tmp_path)] == ["s0", "s1", "s2", "s3", "s5"]
    assert export(root, tmp_path, limit=10).counts["written"] == 10
    rows = rows_of(tmp_path)
    assert len(rows) == read_json(tmp_path / "export.json", "export")["rows"] == 10
    check_tensors(root, rows)


# --- refused --------------------------------------------------------------------------------------


def test_a_damaged_shard_is_never_exported(root: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(root, tmp_path / "out")
    flip(sorted(copied.rglob("shard-*.safetensors"))[2], -3)
    with pytest.raises(VerificationError, match="is damaged at sample"):
        export(copied, tmp_path / "e")
    assert not (tmp_path / "e" / "table.parquet").exists()


def test_another_datasets_export_is_refused(root: Path, masked: Path, tmp_path: Path) -> None:
    out = tmp_path / "e"
    export(root, out, limit=2)
    with pytest.raises(ConflictError, match=r"is another export; it differs in\n  fingerprint"):
        export(masked, out, pad_masked="zeros")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.tex").write_text("")
    with pytest.raises(InputError, match=r"thesis.tex.*not an export"):
        export(root, tmp_path / "mine")
    for file in ("mine/thesis.tex", "mine/thesis.tex/e"):
        with pytest.raises(InputError, match=r"OUT .*thesis.tex is not a folder"):
            export(root, tmp_path / file)
    for inside in (root, root / "e", root.parent):
        with pytest.raises(InputError, match="lie in one another"):
            export(root, inside)


def test_other_captions_are_refused(root: Path, tmp_path: Path) -> None:
    table, path = captions_table(), tmp_path / "captions.parquet"
    texts, fps = table["text"].to_pylist(), table["fps"].to_pylist()
    changed = with_column(table, "text", [*texts[:8], "a new caption", *texts[9:]])
    faster = with_column(table, "fps", [*fps[:20], 12, *fps[21:]])
    turned, more = table.take(list(range(ROWS))[::-1]), pa.concat_tables([table, table.slice(0, 1)])
    for other, said in (
        (changed, r"row 8 .* have the text 'a new caption 15.0 FPS.' for sample 's8', .* take 8"),
        (faster, r"row 20 .*ships 12.0 FPS.' for sample 's20', but .* ships 15.0 FPS.'"),
        (turned, r"row 0 .* have sample 's29', but what was encoded is sample 's0'"),
        (table.slice(0, 29), "has 29 rows: the dataset was made of 30"),
        (more, "has 31 rows: the dataset was made of 30"),
    ):
        pq.write_table(other, path)
        with pytest.raises(ConflictError, match=said) as caught:
            export(root, tmp_path / "e", captions=str(path))
        assert str(path) in str(caught.value)
        assert not (tmp_path / "e" / "export.json").exists()


def test_lists_of_other_lengths_are_refused(tmp_path: Path, tiny_t5: Path, tiny_clip: Path) -> None:
    lists = [["one", "two"], ["three", "four"]]
    root = make(tmp_path, pa.table({"id": [0, 1], "text": lists}), tiny_t5, tiny_clip)
    for other, said in (
        ([["one"], ["three", "four"]], "row 1 .* have sample '1#0', .* is sample '0#1'"),
        ([["one", "two"], ["three"]], "row 1 .* have no more samples, .* is sample '1#1'"),
        ([["one", "two"], ["three", "four", "five"]], "row 1 .* sample '1#2', .* is sample None"),
    ):
        pq.write_table(pa.table({"id": [0, 1], "text": other}), tmp_path / "captions.parquet")
        with pytest.raises(ConflictError, match=said):
            export(root, tmp_path / "e", table_only=True)


def test_the_same_captions_are_the_same_whatever_their_file(root: Path, tmp_path: Path) -> None:
    """A renamed file, and one with columns that were added since."""
    latents = with_column(captions_table(), "latents_path", [None, *["latents.pt"] * (ROWS - 1)])
    latents = with_column(latents, "fps", [15] * ROWS)  # the null is gone: it had no caption
    pq.write_table(latents, tmp_path / "renamed.parquet", row_group_size=3)
    done = export(root, tmp_path / "e", captions=str(tmp_path / "renamed.parquet"))
    rows = rows_of(tmp_path / "e")
    assert [row["latents_path"] for row in rows[:2]] == [NO_LATENTS, "latents.pt"]
    assert done.table.filled_latents == 1
    check_tensors(root, rows)


def test_an_extended_dataset_has_the_rows_of_its_plan(
    tmp_path: Path, tiny_t5: Path, tiny_clip: Path
) -> None:
    """Also while the extension is not finished, and where its file sorts before the others."""
    captions, table = tmp_path / "captions", captions_table()
    captions.mkdir()
    pq.write_table(table.slice(0, 20), captions / "b.parquet")
    job = write_job(tmp_path, captions, tiny_t5, tiny_clip, samples_per_shard=6)
    expect(0, "run", job)
    pq.write_table(table.slice(20), captions / "a.parquet")
    expect(0, "plan", job, "--extend", "--write")
    ids = [f"s{i}" for i in range(ROWS) if i not in NULL_ROWS]
    for end in (18, 28):
        out = tmp_path / f"exported {end}"
        export(tmp_path / "out", out, table_only=True)
        assert [row["id"] for row in rows_of(out)] == ids[:end]
        (captions / "b.parquet").rename(captions / "c.parquet")
        expect(0, "run", job)
        (captions / "c.parquet").rename(captions / "b.parquet")


def test_captions_that_are_not_found(root: Path, tmp_path: Path) -> None:
    copied = shutil.copytree(root, tmp_path / "out")
    config = copied / "config.yaml"
    config.write_text(config.read_text().replace("captions.parquet", "moved.parquet"))
    with pytest.raises(InputError, match="does not exist"):
        export(copied, tmp_path / "e")
    config.unlink()
    with pytest.raises(InputError, match="name them with --captions"):
        export(copied, tmp_path / "e")


def test_refusals(
    root: Path, tmp_path: Path, tiny_t5: Path, tiny_clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"'umt5' cannot.*\['t5'\] would do"):
        export(root, tmp_path / "e", t5="umt5")
    with pytest.raises(InputError, match=r"'t5' cannot.*\['clip'\] would do"):
        export(root, tmp_path / "e", clip="t5")
    clash = with_column(captions_table(), "sample_id", range(ROWS))
    other = make(tmp_path / "clash", clash, tiny_t5, tiny_clip)
    with pytest.raises(InputError, match="'sample_id' that is not their id column"):
        export(other, tmp_path / "e")
    with monkeypatch.context() as patch:
        patch.setattr(export_module, "SPARE_BYTES", 1 << 60)
        with pytest.raises(StorageError, match="free on its file system"):
            export(root, tmp_path / "e")
        export(root, tmp_path / "e", table_only=True)
    (other / "manifest.json").unlink()
    with pytest.raises(IncompleteError):
        export(other, tmp_path / "f")
    empty = make(tmp_path / "empty", captions_table().slice(4, 1), tiny_t5, tiny_clip)
    with pytest.raises(InputError, match=r"nothing to export: no sample is ok \(null_text 1\)"):
        export(empty, tmp_path / "g")


# --- what is printed ------------------------------------------------------------------------------


def test_command_line(root: Path, masked: Path, tmp_path: Path) -> None:
    out = tmp_path / "e"
    code, said, _ = call("export", str(root), str(out), "--format", "opensora")
    assert code == 0
    for line in (
        f"28 rows in {out}/table.parquet",
        "56 tensor files, 56 of them written now",
        "2 samples without an embedding left out: null_text 2",
        "note: encoded with implementation fused",
        'type="cached_video_text"',
        "\n  cached_text = True\n",
        f"--null_t5_path {out}/null_t5.pt --null_clip_path {out}/null_clip.pt",
        "encoded with fps_max=24, vmaf=False: keep them in dataset",
        "patch_size must be 2",
    ):
        assert line in said
    assert "fps is null" not in said  # the sampler takes every frame then
    code, said, _ = call(*f"export {root} {out} --format opensora --table-only".split())
    assert 'type="precomputed_video_text"' in said
    words = f"export {masked} {tmp_path / 'm'} --format opensora --pad-masked zeros --table-only"
    said = call(*words.split())[1]
    assert "without Open-Sora's FPS and motion score" in said
    assert "precompute with the recipe\nopensora" in said
    code, _, said = call("export", str(root), str(out), "--format", "opensora", "--t5", "x")
    assert code == 2
    assert "Traceback" not in said


@pytest.mark.parametrize("all_null", [False, True])
def test_a_null_frame_rate_is_no_reason_for_a_note(
    tmp_path: Path, tiny_t5: Path, tiny_clip: Path, all_null: bool, open_sora: Any
) -> None:
    """Their sampler takes every frame then, and their text has no FPS; num_frames it needs.

    A table of images has a column of nulls alone.
    """
    of_bucket = importlib.import_module("opensora.datasets.bucket").get_bucket_id
    fps = pa.nulls(ROWS) if all_null else pa.array([None, *[30] * (ROWS - 1)], pa.int64())
    table = with_column(captions_table(), "fps", fps)
    table = with_column(table, "num_frames", pa.array([33, None, *[33] * (ROWS - 2)]))
    root = make(tmp_path, table, tiny_t5, tiny_clip, *(() if all_null else RECIPE))
    done = export(root, tmp_path / "e")
    said = "\n".join(done.lines())
    assert "note: num_frames is null in 1 rows; the sampler needs it" in said
    assert "fps is null" not in said
    data = pd.read_parquet(tmp_path / "e" / "table.parquet")
    found = data.apply(of_bucket, axis=1, args=(24,)).tolist()
    rest = 33 if all_null else 16  # every second frame of 30 FPS
    assert (found[0], found[2:]) == (33, [rest] * 26)
    assert np.isnan(found[1])
    path = str(tmp_path / "e" / "table.parquet")
    theirs = open_sora.build({"type": "text", "data_path": path, "fps_max": 24})
    dataset = EmbeddingDataset(root)
    for i, row in enumerate(rows_of(tmp_path / "e")):
        assert theirs[i]["text"] == dataset.encoded_text(dataset.index_of(row["sample_id"]))


def test_patch_size_1_cannot_train_from_cached_text(
    tmp_path: Path, tiny_t5: Path, tiny_clip: Path, open_sora: Any,
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    added = {"buckets": [[1, 256, 256]], "spatial_compression_ratio": 32, "patch_size": 1}
    fields = {"seq_align": 4, "added_tokens": added}
    root = make(tmp_path, captions_table(), tiny_t5, tiny_clip, *RECIPE, **fields)
    said = "\n".join(export(root, tmp_path / "e", table_only=True).lines())
    assert "note: the dataset was made for a trainer of patch_size 1" in said
    assert "patch_size 1 (Open-Sora's high_compression.py) cannot use cached text" in said
    options = {"type": REGISTERED_NAME, "embeddings": str(root), "fps_max": 24}
    monkeypatch.setattr(logging.getLogger("embed_precompute"), "propagate", True)
    with caplog.at_level(logging.WARNING):
        open_sora.build({**options, "data_path": str(tmp_path / "captions.parquet")})
    assert "was made for a trainer of patch_size 1" in caplog.text


def test_patch_has_their_four_lines_at_most() -> None:
    patch = Path(__file__).parents[2] / "scripts" / "opensora" / "null_embeddings.patch"
    lines = patch.read_text().partition("@@")[2].splitlines()[1:]
    assert sum(line.startswith((" ", "-")) for line in lines) == 4
    assert sum(line.startswith("+") for line in lines) == 2
