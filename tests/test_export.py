"""Export for Open-Sora, and its drop-in class, against what Open-Sora's code does with them.

Open-Sora is not installed here: `FakeOpenSora` has its names and does what its cached-text data set
does, written anew. The real one was run by hand; CHANGELOG says when.
"""

from __future__ import annotations

import csv
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from jobs import call, clean_environment, dataset_bytes, write_job

from embed_precompute import EmbeddingDataset
from embed_precompute.errors import (
    ConflictError,
    IncompleteError,
    InputError,
    StorageError,
    VerificationError,
)
from embed_precompute.opensora import tensors
from embed_precompute.opensora.export import OpenSoraOptions, export_opensora, read_ids
from embed_precompute.opensora.table import NO_LATENTS, NUM_PARTS
from embed_precompute.store.plan import read_plan
from embed_precompute.store.records import read_json
from embed_precompute.store.rows import read_samples

ROWS = 30
NULL_ROWS = (4, 11)
NEEDED = ("path", "num_frames", "height", "width", "aspect_ratio", "fps", "resolution")


def captions_table() -> pa.Table:
    """Every column Open-Sora reads; the integer FPS column has a null, in a row without caption."""
    texts = [f"a short film, take {i}, of {'very ' * (i % 5)}old ships" for i in range(ROWS)]
    texts[7] = texts[6]
    return pa.table(
        {
            "id": [f"s{i}" for i in range(ROWS)],
            "text": [None if i in NULL_ROWS else text for i, text in enumerate(texts)],
            "path": [f"/videos/{i}.mp4" for i in range(ROWS)],
            "num_frames": [33] * ROWS,
            "height": [256] * ROWS,
            "width": [256] * ROWS,
            "aspect_ratio": [1.0] * ROWS,
            "resolution": [65536] * ROWS,
            "fps": pa.array([None if i == 4 else 15 for i in range(ROWS)], pa.int64()),
            "tags": [["x"] * (i % 3) for i in range(ROWS)],
            "text_t5_path": ["old"] * ROWS,
        }
    )


def make(
    folder: Path, table: pa.Table, t5: Path, clip: Path, *words: str, **t5_fields: Any
) -> Path:
    """A finished dataset of `table` in folder/out, five shards of a table of 30 rows."""
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, folder / "captions.parquet", row_group_size=7)
    job = write_job(folder, folder / "captions.parquet", t5, clip, samples_per_shard=6, **t5_fields)
    code, _, said = call("run", str(job), *words)
    assert code == 0, said
    return folder / "out"


RECIPE = ("--captions.recipe.kind", "opensora", "--captions.recipe.fps_max", "24")


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


def export(root: Path, out: Path, **options: Any) -> Any:
    return export_opensora(root, out, OpenSoraOptions(**options))


def rows_of(out: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(out / "table.parquet").to_pylist()
    return rows


def load(path: str) -> torch.Tensor:
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
            assert os.path.getsize(row[f"{name}_path"]) < values.nbytes + 2048


# --- tensors and table ----------------------------------------------------------------------------


def test_every_sample_and_the_table(root: Path, tmp_path: Path) -> None:
    done = export(root, tmp_path / "exported")
    rows = rows_of(tmp_path / "exported")
    assert [row["id"] for row in rows] == [f"s{i}" for i in range(ROWS) if i not in NULL_ROWS]
    assert [row["sample_id"] for row in rows] == [row["id"] for row in rows]
    check_tensors(root, rows)
    source = {row["id"]: row for row in captions_table().to_pylist()}
    for row in rows:
        assert row["latents_path"] == NO_LATENTS
        for name in ("text", "tags", *NEEDED):
            assert row[name] == source[row["id"]][name]
    assert (done.num_rows, done.written.files) == (28, 56)
    assert done.not_ok == {"null_text": 2}
    assert done.replaced == ("text_t5_path",)
    schema = pq.read_schema(tmp_path / "exported" / "table.parquet")
    assert schema.metadata is None or b"pandas" not in schema.metadata
    assert schema.field("fps").type == pa.float64()  # as pandas saw it, when "15.0 FPS" was encoded
    stored = {s.sample_id: s.text for p in root.rglob("*.rows.parquet") for s in samples(p)}
    assert all(stored[r["id"]] == f"{r['text']} {r['fps']} FPS." for r in rows)


def samples(path: Path) -> Iterator[Any]:
    return read_samples(path, read_plan(path.parents[2]).tensors)


def test_folders_are_bounded() -> None:
    assert tensors.tensor_path("t5", 0) == "t5/000/000/000000000.pt"
    assert tensors.tensor_path("clip", 12_345_678) == "clip/012/345/012345678.pt"
    folders = {tensors.tensor_path("t5", n).rpartition("/")[0] for n in range(5000)}
    assert len(folders) == 5


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_nulls_are_in_the_trainers_dtype(root: Path, tmp_path: Path, dtype: Any) -> None:
    export(root, tmp_path / "e", trainer_dtype=dtype, table_only=True)
    null = EmbeddingDataset(root).null
    assert null["text_t5"].shape[0] == 24
    for name in ("t5", "clip"):
        values = load(str(tmp_path / "e" / f"null_{name}.pt"))
        assert torch.equal(values, null[f"text_{name}"][None].to(getattr(torch, dtype)))
    assert not (tmp_path / "e" / "t5").exists()
    assert set(rows_of(tmp_path / "e")[0]) >= {"sample_id", "latents_path"}
    assert "text_clip_path" not in rows_of(tmp_path / "e")[0]


def test_failed_samples_get_the_null_embedding(root: Path, tmp_path: Path) -> None:
    export(root, tmp_path / "e", failed="null")
    rows = rows_of(tmp_path / "e")
    assert len(rows) == ROWS
    null = EmbeddingDataset(root).null
    padded = torch.cat([null["text_t5"], null["text_t5"][-1:]])  # as Open-Sora's trainer does
    for i in NULL_ROWS:
        assert rows[i]["text"] == ""
        assert torch.equal(load(rows[i]["text_t5_path"]), padded)
        assert torch.equal(load(rows[i]["text_clip_path"]), null["text_clip"])
    check_tensors(root, [row for i, row in enumerate(rows) if i not in NULL_ROWS])


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
    assert load(str(tmp_path / "e" / "null_t5.pt")).shape[1] == 24


def test_lists_are_exploded(tmp_path: Path, tiny_t5: Path, tiny_clip: Path) -> None:
    lists = [["one cat", "two cats"], [], None, ["a dog", None, "a dog on a hill"]] * 4
    table = pa.table({"id": list(range(16)), "takes": pa.array(lists, pa.list_(pa.string()))})
    words = ("--captions.text_column", "takes", "--captions.normalize", "[whitespace]")
    root = make(tmp_path, table, tiny_t5, tiny_clip, *words)
    export(root, tmp_path / "e")
    rows = rows_of(tmp_path / "e")
    assert [row["sample_id"] for row in rows[:5]] == ["0#0", "0#1", "3#0", "3#2", "4#0"]
    assert [row["text"] for row in rows[:4]] == ["one cat", "two cats", "a dog", "a dog on a hill"]
    assert [row["takes"] for row in rows] == [row["text"] for row in rows]
    check_tensors(root, rows)
    export(root, tmp_path / "null", failed="null")
    kept = rows_of(tmp_path / "null")
    ids = ["0#0", "0#1", "1#0", "2#0", "3#0", "3#1", "3#2"]
    assert [row["sample_id"] for row in kept[:7]] == ids
    assert [row["text"] for row in kept[2:6]] == ["", "", "a dog", ""]


def test_several_files_with_other_columns(tmp_path: Path, tiny_t5: Path, tiny_clip: Path) -> None:
    folder = tmp_path / "captions"
    folder.mkdir()
    for k in range(2):
        table = captions_table().slice(k * 15, 15)
        if k:
            table = table.drop_columns(["tags"]).append_column("extra", pa.array(range(15)))
        pq.write_table(table, folder / f"{k}.parquet")
    job = write_job(tmp_path, folder, tiny_t5, tiny_clip)
    assert call("run", str(job))[0] == 0
    export(tmp_path / "out", tmp_path / "e")
    rows = rows_of(tmp_path / "e")
    assert (rows[0]["extra"], rows[0]["tags"]) == (None, [])
    assert (rows[-1]["extra"], rows[-1]["tags"]) == (14, None)
    check_tensors(tmp_path / "out", rows)


# --- csv and the memory-efficient split -----------------------------------------------------------


def test_csv(root: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"\['tags'\] hold lists"):
        export(root, tmp_path / "e", table="csv")
    table = captions_table().drop_columns(["tags"])
    moved = tmp_path / "moved" / "captions.parquet"
    moved.parent.mkdir()
    pq.write_table(table, moved)
    with pytest.raises(ConflictError, match="not the caption table of this dataset"):
        export(root, tmp_path / "e", table="csv", captions=str(moved))


def test_csv_is_what_pandas_reads_back(tmp_path: Path, tiny_t5: Path, tiny_clip: Path) -> None:
    texts = ['a "quoted" word, and\na line', "plain", "Ünïcode"]
    table = pa.table({"id": ["a", "b", "c"], "text": texts, "fps": [24.0, 30.0, 29.97]})
    root = make(tmp_path, table, tiny_t5, tiny_clip)
    export(root, tmp_path / "e", table="csv")
    with open(tmp_path / "e" / "table.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert [row["text"] for row in rows] == texts
    assert [row["fps"] for row in rows] == ["24.0", "30.0", "29.97"]  # "24" would become an int
    check_tensors(root, rows)


@pytest.mark.parametrize(
    ("sample_id", "text"), [("a", "NA"), ("a", ""), ("007", "x"), ("1e5", "x")]
)
def test_csv_that_pandas_would_misread_is_refused(
    sample_id: str, text: str, tmp_path: Path, tiny_t5: Path, tiny_clip: Path
) -> None:
    root = make(tmp_path, pa.table({"id": [sample_id], "text": [text]}), tiny_t5, tiny_clip)
    with pytest.raises(InputError, match=r"row 0 .* which pandas reads from a CSV as something"):
        export(root, tmp_path / "e", table="csv")
    assert not (tmp_path / "e" / "table.csv").exists()
    export(root, tmp_path / "e")


def check_parts(out: Path) -> None:
    """What Open-Sora's EfficientParquet does: part = row // ceil(rows / 10,000), by sorted name."""
    rows = rows_of(out)
    size = -(-len(rows) // NUM_PARTS)
    names = sorted(os.listdir(out / "table"))
    assert len(names) == -(-len(rows) // size)
    for i, row in enumerate(rows):
        part = pq.read_table(out / "table" / names[i // size]).to_pylist()[i % size]
        assert part["path"] == row["path"]
        assert part == {k: row[k] for k in row if k == "path" or k not in NEEDED}


def test_memory_efficient(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "e"
    assert export(root, out, memory_efficient=True).num_parts == 28
    check_parts(out)
    monkeypatch.setattr("embed_precompute.opensora.table.NUM_PARTS", 10)
    monkeypatch.setattr(sys.modules[__name__], "NUM_PARTS", 10)
    assert export(root, out, memory_efficient=True).num_parts == 10  # 3 rows each, the last 1
    check_parts(out)
    export(root, out, memory_efficient=True, limit=4)
    check_parts(out)
    export(root, out, limit=5)  # parts of another table would be read for it
    assert not (out / "table").exists()


def test_memory_efficient_refusals(
    root: Path, tmp_path: Path, tiny_t5: Path, tiny_clip: Path
) -> None:
    with pytest.raises(InputError, match="first dot"):
        export(root, tmp_path / "v1.0", memory_efficient=True)
    export(root, tmp_path / "v1.0", memory_efficient=True, path_prefix="/links/e")
    assert rows_of(tmp_path / "v1.0")[0]["text_t5_path"].startswith("/links/e/t5/")
    with pytest.raises(InputError, match="needs a parquet table"):
        export(root, tmp_path / "e", memory_efficient=True, table="csv")
    table = captions_table().drop_columns(["aspect_ratio", "fps"])
    other = make(tmp_path / "lean", table, tiny_t5, tiny_clip)
    with pytest.raises(InputError, match="no aspect_ratio, fps"):
        export(other, tmp_path / "e", memory_efficient=True)


# --- resume, subsets, refusals --------------------------------------------------------------------


def test_a_rerun_writes_nothing_again(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "e"
    export(root, out)
    before = {path: path.stat() for path in out.rglob("*.pt") if path.parent != out}
    again = export(root, out)
    assert again.written.skipped_units == 5
    assert again.written.files == 56
    assert all(path.stat().st_mtime_ns == was.st_mtime_ns for path, was in before.items())
    assert export(root, out, recheck=True).written.skipped_units == 0


def test_interrupted_anywhere(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    export(root, tmp_path / "whole")
    out = tmp_path / "e"
    publish_bytes = tensors.publish_bytes
    for stop_after in (1, 9, 25, 26):
        written: list[Path] = []

        def publish(path: Path, payload: bytes, n: int = stop_after, done: Any = written) -> Any:
            done.append(path)
            if len(done) > n:
                raise StorageError(f"{path}: no space")
            return publish_bytes(path, payload)

        monkeypatch.setattr(tensors, "publish_bytes", publish)
        with pytest.raises(StorageError):
            export(root, out)
        monkeypatch.undo()
        assert not (out / "export.json").exists()
        assert not list(out.rglob(".tmp-*"))
    export(root, out)

    def content(folder: Path) -> dict[str, bytes]:
        found = dataset_bytes(folder)
        return {n: b for n, b in found.items() if n.endswith(".pt") or n.startswith("records")}

    assert content(out) == content(tmp_path / "whole")
    check_tensors(root, rows_of(out))


def test_subsets_grow(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "e"
    export(root, out, limit=3)
    assert [row["id"] for row in rows_of(out)] == ["s0", "s1", "s2"]
    (tmp_path / "ids").write_text("s20\ns5\n\ns4\n")
    done = export(root, out, ids=read_ids(tmp_path / "ids"))
    assert [row["id"] for row in rows_of(out)] == ["s5", "s20"]
    assert done.not_ok == {"null_text": 1}
    export(root, out, limit=10)
    rows = rows_of(out)
    assert len(rows) == 10
    check_tensors(root, rows)
    assert read_json(out / "export.json", "export")["rows"] == 10
    with pytest.raises(InputError, match="1 of the 2 ids asked for are not in"):
        export(root, out, ids=frozenset({"s1", "nope"}))
    with pytest.raises(InputError, match="nothing to export"):
        export(root, out, ids=frozenset({"s4"}))


def test_damaged_files_are_found(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "e"
    export(root, out)
    victim = Path(rows_of(out)[3]["text_t5_path"])
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    with pytest.raises(VerificationError, match=victim.name):
        export(root, out, recheck=True)
    victim.write_bytes(content[:-100])  # the size alone shows this one
    with pytest.raises(VerificationError, match=victim.name):
        export(root, out)
    assert not (out / "export.json").exists()
    victim.unlink()
    assert export(root, out).written.skipped_units == 4
    check_tensors(root, rows_of(out))


def test_a_damaged_shard_is_never_exported(tmp_path: Path, tiny_t5: Path, tiny_clip: Path) -> None:
    root = make(tmp_path, captions_table(), tiny_t5, tiny_clip)
    shard = sorted(root.rglob("*.safetensors"))[2]
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    with pytest.raises(VerificationError, match="does not have its checksum"):
        export(root, tmp_path / "e")
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
    for inside in (root, root / "e", root.parent):
        with pytest.raises(InputError, match="lie in one another"):
            export(root, inside)


def test_other_captions_are_refused(tmp_path: Path, tiny_t5: Path, tiny_clip: Path) -> None:
    root = make(tmp_path, captions_table(), tiny_t5, tiny_clip)
    (tmp_path / "captions.parquet").rename(tmp_path / "moved.parquet")
    with pytest.raises(InputError, match="does not exist"):
        export(root, tmp_path / "e")
    with pytest.raises(ConflictError, match="--captions"):
        export(root, tmp_path / "e", captions=str(tmp_path / "moved.parquet"))  # another name
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "moved.parquet").rename(tmp_path / "elsewhere" / "captions.parquet")
    (root / "config.yaml").unlink()
    with pytest.raises(InputError, match="name them with --captions"):
        export(root, tmp_path / "e")
    export(root, tmp_path / "e", captions=str(tmp_path / "elsewhere"))


def test_refusals(
    root: Path, tmp_path: Path, tiny_t5: Path, tiny_clip: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match=r"of encoder 'umt5'.*\['t5'\] would do"):
        export(root, tmp_path / "e", t5="umt5")
    with pytest.raises(InputError, match=r"of encoder 't5'.*\['clip'\] would do"):
        export(root, tmp_path / "e", clip="t5")
    clash = captions_table().append_column("sample_id", pa.array(range(ROWS)))
    other = make(tmp_path / "clash", clash, tiny_t5, tiny_clip)
    with pytest.raises(InputError, match="'sample_id' that is not their id column"):
        export(other, tmp_path / "e")
    monkeypatch.setattr(tensors, "SPARE_BYTES", 1 << 60)
    with pytest.raises(StorageError, match="are free on its file system"):
        export(root, tmp_path / "e")
    export(root, tmp_path / "e", table_only=True)
    (other / "manifest.json").unlink()
    with pytest.raises(IncompleteError):
        export(other, tmp_path / "f")


def test_command_line(root: Path, tmp_path: Path) -> None:
    out = tmp_path / "e"
    code, said, _ = call("export", str(root), str(out), "--format", "opensora")
    assert code == 0
    assert f"28 rows in {out}/table.parquet" in said
    assert "56 tensor files" in said
    assert "2 samples that are not ok left out: null_text 2" in said
    for switch in ('type="cached_video_text"', "cached_text=True", "  cached_text = True"):
        assert switch in said
    assert f"--null_t5_path {out}/null_t5.pt --null_clip_path {out}/null_clip.pt" in said
    assert "Encoded with fps_max=24, vmaf=False" in said
    code, said, _ = call(*f"export {root} {out} --format opensora --table-only".split())
    assert 'type="precomputed_video_text"' in said
    code, _, said = call("export", str(root), str(out), "--format", "opensora", "--t5", "x")
    assert code == 2
    assert "Traceback" not in said


def test_patch_has_their_four_lines_at_most() -> None:
    patch = Path(__file__).parents[1] / "scripts" / "opensora" / "null_embeddings.patch"
    lines = patch.read_text().partition("@@")[2].splitlines()[1:]
    assert sum(line.startswith((" ", "-")) for line in lines) == 4
    assert sum(line.startswith("+") for line in lines) == 2


# --- the drop-in class ----------------------------------------------------------------------------

FAKE_OPENSORA = '''
import pyarrow.parquet as pq

class Frame:
    """The little of a pandas frame that the class uses."""
    def __init__(self, rows): self.rows = rows; self.columns = list(rows[0])
    def __len__(self): return len(self.rows)
    def __getitem__(self, column): return Column([row[column] for row in self.rows])
    @property
    def iloc(self): return self
    def reset_index(self, drop): return self
class Column(list):
    def tolist(self): return list(self)
class Iloc(Frame):
    def __getitem__(self, at):
        if isinstance(at, str): return super().__getitem__(at)
        if isinstance(at, list): return Iloc([self.rows[i] for i in at])
        return self.rows[at]

class VideoTextDataset:
    def __init__(self, data_path=None, memory_efficient=False, fps_max=16, **kwargs):
        self.data = Iloc(pq.read_table(data_path).to_pylist())
        self.fps_max, self.unreadable = fps_max, ()
    def __len__(self): return len(self.data)
    def __getitem__(self, index): return self.getitem(index)
    def getitem(self, index):
        row = int(index.split("-")[0])
        if row in self.unreadable: return None
        return {"text": self.data.iloc[row]["text"], "index": row, "video": row}
class CachedVideoTextDataset(VideoTextDataset):
    def __init__(self, cached_video=False, cached_text=False, return_latents_path=False,
                 load_original_video=True, **kwargs):
        super().__init__(**kwargs)
        self.cached_video, self.cached_text = cached_video, cached_text
        self.return_latents_path = return_latents_path
        self.load_original_video = load_original_video
    def get_latents(self, path): return path
    def getitem(self, index): raise AssertionError("ours comes first")
'''
FAKE_REGISTRY = """
class Registry(dict):
    def register_module(self, name, module):
        if name in self: raise KeyError(name)
        self[name] = module
DATASETS = Registry()
"""
USE = """
import pickle, sys, torch
from opensora.registry import DATASETS
from torch.utils.data import DataLoader, default_collate
import embed_precompute.opensora.dataset as ours
from embed_precompute import EmbeddingDataset
out, table = sys.argv[1:3]
made = DATASETS["precomputed_video_text"]
assert made is ours.PrecomputedVideoTextDataset is ours.register()
dataset = made(embeddings=out, data_path=table, fps_max=24)
assert dataset.fps_max == 24 and len(dataset) == 28 and dataset.num_dropped == 2
stored = EmbeddingDataset(out)
indexes = [[f"{i}-1-64-64" for i in range(k, k + 4)] for k in range(0, 28, 4)]
for context in (None, "fork", "spawn"):
    loader = DataLoader(dataset, batch_sampler=indexes, num_workers=0 if context is None else 1,
                        multiprocessing_context=context, collate_fn=default_collate)
    rows = 0
    for batch in loader:
        for i in batch["index"].tolist():
            want = stored[i]
            assert dataset.data.iloc[i]["id"] == want["id"]
            assert torch.equal(batch["text_t5"][i % 4], want["text_t5"])
            assert torch.equal(batch["text_clip"][i % 4], want["text_clip"])
            rows += 1
    assert rows == 28
dataset.unreadable = (3,)
assert dataset["3-1-64-64"] is None
dataset.return_latents_path, dataset.load_original_video = True, False
dataset.data.iloc[0]["latents_path"] = "l"
assert dataset["0-1-64-64"]["latents_path"] == "l" and "video" not in dataset["0-1-64-64"]
lean = made(embeddings=out, data_path=table, id_column="id", memory_efficient=True)
assert len(lean) == 30 and torch.equal(lean["0-1-1-1"]["text_clip"], stored[0]["text_clip"])
from embed_precompute.errors import InputError
for index, options, message in [
    ("4-1-1-1", dict(memory_efficient=True, id_column="id"), "its status is null_text"),
    (None, dict(on_missing="error"), "2 of 30 rows have no embedding"),
    (None, dict(id_column="nope"), "no column 'nope'"),
    (None, dict(id_column="aspect_ratio"), "expected strings or integers"),
    (None, dict(t5="clip"), "of encoder 'clip'"),
]:
    try:
        made(embeddings=out, data_path=table, **options)[index]
    except InputError as error:
        assert message in str(error), error
    else:
        raise AssertionError(message)
print("fine")
"""


def test_drop_in_class(root: Path, tmp_path: Path) -> None:
    package = tmp_path / "opensora"
    (package / "datasets").mkdir(parents=True)
    (package / "__init__.py").write_text("")
    (package / "registry.py").write_text(FAKE_REGISTRY)
    (package / "datasets" / "__init__.py").write_text("")
    (package / "datasets" / "datasets.py").write_text(FAKE_OPENSORA)
    (tmp_path / "use.py").write_text(f"if __name__ == '__main__':\n{indent(USE)}")
    table = root.parent / "captions.parquet"
    environment = clean_environment()
    environment["PYTHONPATH"] = f"{tmp_path}{os.pathsep}{environment['PYTHONPATH']}"
    done = subprocess.run(
        [sys.executable, "use.py", str(root), str(table)],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "fine\n", done.stderr


def indent(text: str) -> str:
    return "".join(f"    {line}" for line in io.StringIO(text))


def test_drop_in_without_opensora() -> None:
    import embed_precompute.opensora.dataset as ours

    with pytest.raises(InputError, match="needs Open-Sora v2"):
        ours.PrecomputedVideoTextDataset  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'Precomputed'"):
        ours.Precomputed  # noqa: B018
