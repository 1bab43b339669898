"""The drop-in dataset class, on a transcription of Open-Sora's classes with pandas."""

from __future__ import annotations

import logging
import random
import shutil
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from handmade import write_dataset
from jobs import call, write_job
from opensora_case import NULL_ROWS, RECIPE, ROWS, captions_table, make, with_column
from torch.utils.data import DataLoader, default_collate

import embed_precompute.opensora.dataset as ours
from embed_precompute import EmbeddingDataset
from embed_precompute.errors import ConflictError, InputError, VerificationError
from embed_precompute.opensora.export import OpenSoraOptions, export_opensora

KEPT = [i for i in range(ROWS) if i not in NULL_ROWS]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, tiny_t5: Path, tiny_clip: Path) -> Path:
    return make(tmp_path_factory.mktemp("drop"), captions_table(), tiny_t5, tiny_clip, *RECIPE)


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory, tiny_t5: Path, tiny_clip: Path) -> Path:
    """Made of the captions as they are, with row numbers as ids."""
    folder = tmp_path_factory.mktemp("plain")
    return make(folder, captions_table(), tiny_t5, tiny_clip, "--captions.id_column", "null")


@pytest.fixture
def drop_in(open_sora: Any, root: Path) -> Any:
    def build(embeddings: Any = root, data_path: Any = None, **options: Any) -> Any:
        path = data_path or Path(embeddings).parent / "captions.parquet"
        cfg = {"type": ours.REGISTERED_NAME, "fps_max": 24, **options}
        return open_sora.build({**cfg, "embeddings": str(embeddings), "data_path": str(path)})

    return build


def write(folder: Path, table: pa.Table) -> Path:
    pq.write_table(table, folder / "table.parquet")
    return folder / "table.parquet"


def index_of(row: int) -> str:
    return f"{row}-2-4-4"


# --- what it gives --------------------------------------------------------------------------------


def test_it_gives_what_an_export_gives(
    open_sora: Any, drop_in: Any, root: Path, tmp_path: Path
) -> None:
    export_opensora(root, tmp_path / "e", OpenSoraOptions())
    table = str(tmp_path / "e" / "table.parquet")
    theirs = open_sora.build(
        {"type": "cached_video_text", "cached_text": True, "data_path": table, "fps_max": 24}
    )
    dataset = drop_in()
    assert (len(dataset), dataset.num_dropped) == (len(theirs), 2) == (28, 2)
    for row in range(28):
        found, expected = dataset[index_of(row)], theirs[index_of(row)]
        assert found.keys() == expected.keys()
        assert (found["text"], found["index"]) == (expected["text"], expected["index"])
        for name in ("text_t5", "text_clip", "video"):
            assert torch.equal(found[name], expected[name])


def test_in_a_data_loader(drop_in: Any, root: Path) -> None:
    """Its class is made at run time, and is pickled into a worker all the same."""
    dataset, stored = drop_in(), EmbeddingDataset(root)
    options: dict[str, Any] = {"num_workers": 1, "multiprocessing_context": "spawn"}
    batches = [[index_of(i) for i in range(k, k + 4)] for k in range(0, 28, 4)]
    found = list(DataLoader(dataset, batch_sampler=batches, collate_fn=default_collate, **options))
    assert torch.equal(torch.cat([batch["index"] for batch in found]), torch.arange(28))
    expected = torch.stack([stored[i]["text_t5"] for i in range(28)])
    assert torch.equal(torch.cat([batch["text_t5"] for batch in found]), expected)


def test_videos_latents_and_damage(drop_in: Any, tmp_path: Path, root: Path) -> None:
    paths = ["unreadable.mp4", *["video.mp4"] * (ROWS - 1)]
    table = with_column(captions_table(), "path", paths)
    torch.save(torch.ones(2), tmp_path / "latents.pt")
    table = with_column(table, "latents_path", [str(tmp_path / "latents.pt")] * ROWS)
    copied = shutil.copytree(root, tmp_path / "out")
    dataset = drop_in(copied, write(tmp_path, table))
    assert dataset[index_of(0)] is None
    dataset.cached_video = dataset.return_latents_path = True
    dataset.load_original_video = False
    sample = dataset[index_of(0)]
    names = {"text_t5", "text_clip", "text_t5_path", "text_clip_path"}
    assert sample.keys() == {"video_latents", "latents_path", *names}
    assert torch.equal(sample["video_latents"], torch.ones(2))
    next(copied.rglob("shard-000004*.safetensors")).unlink()
    with pytest.raises(VerificationError, match="shard-000004"):
        dataset[index_of(27)]


# --- which row is which sample --------------------------------------------------------------------


def check_rows(dataset: Any, embeddings: Path, ids: list[str]) -> None:
    """Row k of the table has the embedding of sample ids[k]."""
    stored = EmbeddingDataset(embeddings)
    assert len(dataset) == len(ids)
    for row, sample_id in enumerate(ids):
        expected = stored[stored.index_of(sample_id)]
        assert torch.equal(dataset[index_of(row)]["text_t5"], expected["text_t5"])


def test_the_datasets_id_column_decides(
    drop_in: Any, tmp_path: Path, tiny_t5: Path, tiny_clip: Path
) -> None:
    """The table also has `id`, with the same ids in other rows: these once were trained."""
    table = captions_table().rename_columns(["clip_id", *captions_table().column_names[1:]])
    words = (*RECIPE, "--captions.id_column", "clip_id")
    embeddings = make(tmp_path / "d", table, tiny_t5, tiny_clip, *words)
    shifted = with_column(table, "id", [f"s{(i + 1) % ROWS}" for i in range(ROWS)])
    turned = shifted.take([*range(10, ROWS), *range(10)])
    path = write(tmp_path, turned)
    ids = [f"s{i}" for i in (*range(10, ROWS), *range(10)) if i not in NULL_ROWS]
    check_rows(drop_in(embeddings, path), embeddings, ids)
    with pytest.raises(ConflictError, match="rows have another text than their sample"):
        drop_in(embeddings, path, id_column="id")
    with pytest.raises(InputError, match="no column 'clip_id', and it names the samples"):
        drop_in(embeddings, write(tmp_path, turned.drop_columns(["clip_id"])))


def test_row_numbers(drop_in: Any, plain: Path, tmp_path: Path) -> None:
    """The table's own `id` means nothing to a dataset that was made without one."""
    own = with_column(captions_table(), "id", [(i + 1) % ROWS for i in range(ROWS)])
    options = {"fps_max": None}
    check_rows(drop_in(plain, write(tmp_path, own), **options), plain, [str(i) for i in KEPT])
    with pytest.raises(InputError, match=r"row numbers .* of 30 rows, and this one has 29"):
        drop_in(plain, write(tmp_path, own.slice(1)), **options)
    with pytest.raises(ConflictError, match=r"row 1, sample '1': .*, encoded was"):
        drop_in(plain, write(tmp_path, own.take([0, 2, 1, *range(3, ROWS)])), **options)
    with pytest.raises(ConflictError, match="27 of 28 rows have another text"):
        drop_in(plain, write(tmp_path, own), id_column="id", **options)


def test_rows_that_failed_and_rows_that_are_absent_are_counted_apart(
    drop_in: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    ids = [f"s{i}" if i < 27 else f"gone{i}" for i in range(ROWS)]
    table = write(tmp_path, with_column(captions_table(), "id", ids))
    said = (
        rf"5 of {ROWS} rows have no embedding by their column 'id' \(2 failed, 3 are not in the da"
    )
    with pytest.raises(InputError, match=said):
        drop_in(data_path=table, on_missing="error")
    monkeypatch.setattr(logging.getLogger("embed_precompute"), "propagate", True)
    assert len(drop_in(data_path=table)) == 25
    assert "3 are not in the dataset" in caplog.text
    caplog.clear()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    drop_in(data_path=table)
    assert not caplog.text, "rank 0 says it for all"


def test_an_exported_table_names_the_samples(
    drop_in: Any, tmp_path: Path, tiny_t5: Path, tiny_clip: Path
) -> None:
    """Lists of captions, by row number: only the export has a row for each caption."""
    lists = [[f"one {i}", f"a  second {i}"] if i % 2 else None for i in range(9)]
    table = pa.table({"takes": pa.array(lists, pa.list_(pa.string())), "path": ["p"] * 9})
    words = ("--captions.text_column", "takes", "--captions.id_column", "null")
    words += ("--captions.normalize", "[whitespace]")
    embeddings = make(tmp_path, table, tiny_t5, tiny_clip, *words)
    with pytest.raises(InputError, match=r"9 of 9 rows .* row number: sample '0' is not"):
        drop_in(embeddings)
    export_opensora(embeddings, tmp_path / "e", OpenSoraOptions(table_only=True))
    dataset = drop_in(embeddings, tmp_path / "e" / "table.parquet", fps_max=None)
    check_rows(dataset, embeddings, [f"{i}#{k}" for i in (1, 3, 5, 7) for k in (0, 1)])


def test_several_folders(
    drop_in: Any, root: Path, tmp_path: Path, tiny_t5: Path, tiny_clip: Path
) -> None:
    more = with_column(captions_table(), "id", [f"m{i}" for i in range(ROWS)])
    embeddings = make(tmp_path, more, tiny_t5, tiny_clip, *RECIPE)
    both = write(tmp_path, pa.concat_tables([more, captions_table()]))
    dataset = ours.PrecomputedVideoTextDataset(
        embeddings=[root, embeddings], data_path=str(both), fps_max=24
    )
    assert len(dataset) == 56
    stored = EmbeddingDataset(embeddings)
    assert torch.equal(dataset[index_of(5)]["text_clip"], stored[5]["text_clip"])


# --- sequence parallelism: a folder for each text length ------------------------------------------

SP_SIZE, MAX_LENGTH = 4, 24
BUCKETS = {"1-16-16": 1, "1-16-32": 2, "1-48-16": 3, "5-16-32": 4, "4-32-32": 4, "33-16-16": 9}
"""Frames, height and width of a clip, and the tokens it has for Open-Sora's model."""


def text_length(added_tokens: int) -> int:
    """opensora/models/text/conditioner.py."""
    length = MAX_LENGTH
    while (added_tokens + length) % SP_SIZE != 0:
        length += 1
    return length


@pytest.fixture(scope="module")
def of_length(
    tmp_path_factory: pytest.TempPathFactory, tiny_t5: Path, tiny_clip: Path
) -> dict[int, Path]:
    folder, found = tmp_path_factory.mktemp("lengths"), {}
    for added in range(SP_SIZE):
        made = make(
            folder / str(added),
            captions_table(),
            tiny_t5,
            tiny_clip,
            *RECIPE,
            seq_align=SP_SIZE,
            added_tokens=added,
        )
        found[text_length(added)] = made
    assert sorted(found) == [24, 25, 26, 27]
    return found


def test_the_bucket_picks_the_length(open_sora: Any, of_length: dict[int, Path]) -> None:
    table = next(iter(of_length.values())).parent / "captions.parquet"
    options = {"type": ours.REGISTERED_NAME, "fps_max": 24, "data_path": str(table)}
    dataset = open_sora.build({**options, "embeddings": list(of_length.values())})
    stored = {length: EmbeddingDataset(folder) for length, folder in of_length.items()}
    for bucket, tokens in BUCKETS.items():
        for row in (0, 20):
            found, length = dataset[f"{row}-{bucket}"]["text_t5"], text_length(tokens)
            assert (len(found) + tokens) % SP_SIZE == 0
            assert torch.equal(found, stored[length][row]["text_t5"])
    batch = [f"{row}-5-16-32" for row in range(3)]
    loader: Any = DataLoader(dataset, batch_sampler=[batch], num_workers=1)
    assert next(iter(loader))["text_t5"].shape[:2] == (3, MAX_LENGTH)
    two = {**options, "embeddings": [of_length[24], of_length[25]]}
    with pytest.raises(InputError) as caught:
        open_sora.build(two)["0-33-16-16"]
    for said in (
        "bucket 33x16x16 adds 9 tokens (time_compression_ratio 4, spatial_compression_ratio 8)",
        "with seq_align 4 its texts have 27 vectors; there are folders of 24, 25",
        "encoders.t5.added_tokens 9",
    ):
        assert said in str(caught.value)
    other_autoencoder = {"time_compression_ratio": 1, "spatial_compression_ratio": 16}
    assert len(open_sora.build({**two, **other_autoencoder})["0-3-32-32"]["text_t5"]) == 25


def test_missing_lengths_are_named_before_training(
    drop_in: Any, of_length: dict[int, Path]
) -> None:
    one = of_length[MAX_LENGTH]
    squares: dict[str, Any] = {"256px_ar1:1": {1: [1.0, 8], 5: [1.0, 4]}}  # 256 and 512 tokens
    assert len(drop_in(one, bucket_config=squares)) == 28
    said = r"the bucket 256px 1x\d+x\d+ adds \d+ tokens .* texts have 2[567] vectors; .* of 24\. "
    with pytest.raises(InputError, match=said):
        drop_in(one, bucket_config={**squares, "256px": {1: [1.0, 8]}})
    with pytest.raises(InputError, match=r"patch_size is 1: .* patches of 2 x 2"):
        drop_in(one, patch_size=1)


def test_folders_that_differ_in_more_than_the_length(
    open_sora: Any, of_length: dict[int, Path], root: Path, tmp_path: Path, tiny_t5: Path,
    tiny_clip: Path,
) -> None:  # fmt: skip
    options = {"type": ours.REGISTERED_NAME, "fps_max": 24}
    options["data_path"] = str(root.parent / "captions.parquet")
    with pytest.raises(ConflictError, match="seq_align: 4 -> 1"):
        open_sora.build({**options, "embeddings": [of_length[24], root]})
    fields = {"seq_align": SP_SIZE, "added_tokens": 5}
    same_length = make(tmp_path, captions_table(), tiny_t5, tiny_clip, *RECIPE, **fields)
    with pytest.raises(ConflictError, match="added_tokens: 0 -> 5"):
        open_sora.build({**options, "embeddings": [of_length[24], of_length[27], same_length]})


def test_a_row_that_one_length_lacks(
    open_sora: Any, of_length: dict[int, Path], tmp_path: Path, tiny_t5: Path, tiny_clip: Path
) -> None:
    fields = {"seq_align": SP_SIZE, "added_tokens": 1}
    few = make(tmp_path, captions_table().slice(0, 9), tiny_t5, tiny_clip, *RECIPE, **fields)
    table = of_length[24].parent / "captions.parquet"
    options = {"type": ours.REGISTERED_NAME, "fps_max": 24, "data_path": str(table)}
    dataset = open_sora.build({**options, "embeddings": [of_length[24], few]})
    assert len(dataset) == 28
    assert len(dataset["7-1-16-16"]["text_t5"]) == 27
    assert len(dataset["8-4-32-32"]["text_t5"]) == 24
    with pytest.raises(InputError, match=r"row 8 has no embedding among the texts of 27 vectors"):
        dataset["8-1-16-16"]
    changed = captions_table().slice(0, 9)
    texts = ["new", *changed["text"].to_pylist()[1:]]
    other = make(
        tmp_path / "c", with_column(changed, "text", texts), tiny_t5, tiny_clip, *RECIPE, **fields
    )
    with pytest.raises(ConflictError, match="1 of 28 rows have another text"):
        open_sora.build({**options, "embeddings": [of_length[24], other]})


def test_rows_without_an_embedding(drop_in: Any, root: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"2 of 30 rows .* column 'id': .*status is null_text"):
        drop_in(on_missing="error")
    ids = ["x", *(f"s{i}" for i in range(1, ROWS))]
    path = write(tmp_path, with_column(captions_table(), "id", ids))
    check_rows(drop_in(data_path=path), root, [f"s{i}" for i in KEPT[1:]])
    floats = with_column(captions_table(), "number", [None, *range(1, ROWS)])
    with pytest.raises(InputError, match="expected strings or integers"):
        drop_in(data_path=write(tmp_path, floats), id_column="number")


# --- which text is trained ------------------------------------------------------------------------


def random_table(seed: int) -> pa.Table:
    """FPS and motion columns of every kind that pandas reads in its own way."""
    rng = random.Random(seed)
    texts = [f"caption {seed} of clip {i}" for i in range(24)]
    table = pa.table({"id": [f"s{i}" for i in range(24)], "text": texts, "path": ["p"] * 24})
    kind = rng.choice(["int", "int with null", "float", "none"])
    fps: list[Any] = [rng.choice([0, 8, 15, 24, 25, 30, 60, 999]) for _ in texts]
    if kind == "float":
        fps = [rng.choice([value, value + 0.97, float("nan"), None]) for value in fps]
    if kind == "int with null":
        fps[rng.randrange(24)] = None
    if kind != "none":
        table = table.append_column("fps", pa.array(fps))
    if rng.random() < 0.8:
        motion = [rng.choice([None, 0.4, 0.5, 7.0, 12.49, float("nan")]) for _ in texts]
        table = table.append_column("score_vmafmotion", pa.array(motion, pa.float64()))
    return table


@pytest.mark.parametrize("seed", range(12))
def test_what_is_compared_is_what_the_trainer_would_encode(
    open_sora: Any, drop_in: Any, seed: int, tmp_path: Path
) -> None:
    table, rng = random_table(seed), random.Random(seed)
    settings = {"fps_max": rng.choice([16, 24, 30, 999, None]), "vmaf": rng.random() < 0.7}
    path = write(tmp_path, table)
    theirs = open_sora.build({"type": "text", "data_path": str(path), **settings})
    texts = [theirs.getitem(i)["text"] for i in range(24)]
    write_dataset(tmp_path / "d", texts)
    assert len(drop_in(tmp_path / "d", path, pad_masked="zeros", **settings)) == 24
    write_dataset(tmp_path / "other", [*texts[:23], texts[23] + "!"])
    with pytest.raises(ConflictError, match="1 of 24 rows have another text"):
        drop_in(tmp_path / "other", path, pad_masked="zeros", **settings)


@pytest.mark.parametrize("fps", [[24, 8, 60], [24, None, 60], [23.976, 8.0, 60.0]], ids=str)
def test_open_soras_own_csv(
    drop_in: Any, fps: list[Any], tmp_path: Path, tiny_t5: Path, tiny_clip: Path
) -> None:
    """Its trainer reads the same file with pandas: every row must have the text that it makes."""
    texts = ['a "large" dog,\nand a cat', "", "naïve"]
    columns = {"path": ["7.mp4", "b", "c"], "text": texts, "num_frames": [33] * 3, "fps": fps}
    table = pd.DataFrame({**columns, "fps": pd.array(fps, dtype=object)})
    table.to_csv(tmp_path / "captions.csv", index=False)
    job = write_job(tmp_path, tmp_path / "captions.csv", tiny_t5, tiny_clip)
    assert call("run", str(job), *RECIPE)[0] == 0
    dataset = drop_in(tmp_path / "out", tmp_path / "captions.csv")
    assert (len(dataset), dataset.num_dropped) == (2, 1)  # an empty field is no caption
    export_opensora(tmp_path / "out", tmp_path / "e", OpenSoraOptions(table_only=True))
    exported = pq.read_table(tmp_path / "e" / "table.parquet")
    assert exported["sample_id"].to_pylist() == ["7.mp4", "c"]
    assert exported.schema.field("num_frames").type == pa.int64()
    assert len(drop_in(tmp_path / "out", tmp_path / "e" / "table.parquet")) == 2


def test_several_text_columns(drop_in: Any, tmp_path: Path, tiny_t5: Path, tiny_clip: Path) -> None:
    """Their samples are rows of an export's table, where `text` is the caption of each."""
    long = pa.array([None, *(f"a longer caption {i}" for i in range(1, ROWS))])
    table = with_column(captions_table(), "long", long)
    words = ("--captions.text_column", "[text, long]", *RECIPE)
    root = make(tmp_path, table, tiny_t5, tiny_clip, *words)
    with pytest.raises(
        InputError, match=r"'s0' is not in .*: s0#text, s0#long \(no embedding: null_text\)\. "
    ):
        drop_in(root)
    export_opensora(root, tmp_path / "e", OpenSoraOptions(table_only=True))
    exported = tmp_path / "e" / "table.parquet"
    rows = pq.read_table(exported).to_pylist()
    assert [row["sample_id"] for row in rows[:3]] == ["s0#text", "s1#text", "s1#long"]
    assert [row["text"] for row in rows[1:3]] == [table["text"][1].as_py(), "a longer caption 1"]
    check_rows(drop_in(root, exported), root, [row["sample_id"] for row in rows])
    assert len(drop_in(root, exported, compare="dataset")) == len(rows) == 2 * ROWS - 3


def test_changed_captions_do_not_train(drop_in: Any, tmp_path: Path) -> None:
    texts = captions_table()["text"].to_pylist()
    changed = ["new" if i in (9, 20, 21, 22, 23) else text for i, text in enumerate(texts)]
    path = write(tmp_path, with_column(captions_table(), "text", changed))
    with pytest.raises(ConflictError) as caught:
        drop_in(data_path=path)
    said = str(caught.value).splitlines()
    assert said[0] == "5 of 28 rows have another text than their sample:"
    assert "  row 9, sample 's9': the trainer makes 'new 15.0 FPS.', encoded was" in said[1]
    assert "take 9, of very very very very old ships 15.0 FPS.'" in said[1]
    assert said[3].startswith("  row 21,")
    assert "and fps_max=24, vmaf=False in dataset" in said[4]
    with pytest.raises(ConflictError, match=r"the dataset makes 'new 15\.0 FPS"):
        drop_in(data_path=path, compare="dataset")


def test_the_trainers_settings_are_the_datasets(drop_in: Any, plain: Path, tmp_path: Path) -> None:
    for settings in ({"fps_max": 10}, {"fps_max": None}):
        with pytest.raises(ConflictError, match="28 of 28 rows have another text"):
            drop_in(**settings)
        assert len(drop_in(**settings, compare="dataset")) == 28
    with pytest.raises(ConflictError, match="28 of 28 rows have another text"):
        drop_in(plain)
    assert len(drop_in(plain, compare="dataset")) == 28
    no_text = write(tmp_path, captions_table().drop_columns(["text"]))
    with pytest.raises(InputError, match="no column 'text', and the text of the trainer is made"):
        drop_in(data_path=no_text)


def test_normalised_captions(drop_in: Any, tmp_path: Path, tiny_t5: Path, tiny_clip: Path) -> None:
    texts = [f"two  blanks {i}" for i in range(4)]
    table = pa.table({"id": list(range(4)), "text": texts, "path": ["p"] * 4})
    embeddings = make(tmp_path, table, tiny_t5, tiny_clip, "--captions.normalize", "[whitespace]")
    with pytest.raises(ConflictError, match="makes 'two  blanks 0', encoded was 'two blanks 0'"):
        drop_in(embeddings)
    assert len(drop_in(embeddings, compare="dataset")) == 4


# --- refused --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"memory_efficient": True}, "memory_efficient is True"),
        ({"id_column": "nope"}, "no column 'nope'"),
        ({"t5": "clip"}, "'clip' cannot give text_t5"),
        ({"on_missing": "skip"}, "on_missing is 'skip'"),
        ({"compare": "no"}, "compare is 'no'"),
        ({"pad_masked": "no"}, "pad_masked is 'no'"),
    ],
)
def test_refused(drop_in: Any, options: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        drop_in(**options)


def test_without_open_sora() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(vars(ours), ours.CLASS_NAME, raising=False)
        patch.setitem(sys.modules, "opensora.datasets.datasets", None)
        with pytest.raises(InputError, match="needs Open-Sora v2"):
            ours.PrecomputedVideoTextDataset  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'Precomputed'"):
        ours.Precomputed  # noqa: B018
