"""EmbeddingDataset and collate_embeddings: what a training job sees."""

from __future__ import annotations

import dataclasses
import hashlib
import pickle
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from breaking import flip
from handmade import (
    embedding,
    make_plan,
    paths_of,
    rewrite_json,
    samples_of,
    write_dataset,
    write_samples,
    write_units,
)
from jobs import edit, expect, run_code, write_captions, write_job
from torch.utils.data import DataLoader
from transformers import AutoTokenizer

import embed_precompute.train.dataset as dataset_module
from embed_precompute import ConditionDropout, EmbeddingLoader
from embed_precompute.errors import ConflictError, IncompleteError, InputError, VerificationError
from embed_precompute.store.index import TensorEntry, read_manifest
from embed_precompute.store.manifest import finalize
from embed_precompute.store.records import read_null_record
from embed_precompute.train.dataset import EmbeddingDataset, SampleLookupError, collate_embeddings

# s1 is null, s3 is not finite, s0, s4 and s7 are equal (s4 and s7 are in other shards).
TEXTS = ["a b c", None, "", "nan", "a b c", "d e", "f é", "a b c"]
OK = [0, 2, 4, 5, 6, 7]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("datasets") / "out"
    write_dataset(folder, TEXTS)
    return folder


@pytest.fixture
def own_root(root: Path, tmp_path: Path) -> Path:
    """A dataset that a test may damage."""
    return Path(shutil.copytree(root, tmp_path / "out"))


def check(sample: dict[str, Any], row: int, first: int = 0) -> None:
    text = TEXTS[row]
    assert text is not None
    assert list(sample) == ["id", "text_clip", "text_t5", "text_t5_token_mask"]
    assert sample["text_t5_token_mask"].tolist() == [True] * len(sample["text_t5"])
    assert sample["id"] == f"s{first + row}"
    for name in ("clip", "t5"):
        assert torch.equal(sample[f"text_{name}"], embedding(name, text))


# --- samples --------------------------------------------------------------------------------------


@pytest.mark.parametrize("verify", ["never", "rows"])
@pytest.mark.parametrize("copy", [True, False])
def test_samples_in_input_order(root: Path, verify: Any, copy: bool) -> None:
    dataset = EmbeddingDataset(root, verify, copy=copy)
    assert len(dataset) == len(OK)
    for i, row in enumerate(OK):
        check(dataset[i], row)
        check(dataset[i - len(OK)], row)
        check(dataset[np.int64(i)], row)  # type: ignore[index]
    assert [sample["id"] for sample in dataset] == [f"s{row}" for row in OK]
    asked = [5, 0, -1, 0, 3]  # a batch keeps the order that was asked for
    for i, sample in zip(asked, dataset.__getitems__(asked), strict=True):
        check(sample, OK[i])
    wrong: Any
    for wrong in (slice(0, 3), "s0", 1.0):
        with pytest.raises(
            InputError, match=f"the index is {re.escape(repr(wrong))}: expected an i"
        ):
            dataset[wrong]
    for i in (len(OK), -len(OK) - 1, 10**20):
        with pytest.raises(IndexError, match="the dataset has 6 samples"):
            dataset[i]


def test_tensors_own_their_memory(root: Path) -> None:
    dataset = EmbeddingDataset(root)
    before = dataset[0]["text_t5"].clone()
    for tensor in (dataset[0]["text_t5"], dataset.null["text_t5"]):
        assert tensor.is_contiguous()
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        tensor.zero_()
    assert torch.equal(dataset[0]["text_t5"], before)
    assert dataset.null["text_t5"].any()
    shared = EmbeddingDataset(root, copy=False)
    assert shared[0]["text_t5"].untyped_storage().nbytes() > before.nbytes


def test_null_and_facts(root: Path) -> None:
    dataset, manifest = EmbeddingDataset(root, "rows"), read_manifest(root)
    for name in ("clip", "t5"):
        assert torch.equal(dataset.null[f"text_{name}"], embedding(name, ""))
    assert (dataset.manifest, dataset.fingerprint) == (manifest, manifest.fingerprint)
    assert dataset.tensors["t5"] == TensorEntry("t5", "token", 4, "bfloat16")


def test_a_dataset_says_what_it_is(root: Path) -> None:
    said = f"{root}: {len(OK)} samples, text_clip [3] bfloat16, text_t5 [L, 4] bfloat16"
    assert repr(EmbeddingDataset(root)) == f"EmbeddingDataset({said})"


def test_ids_of_an_integer_column_may_be_numbers(tmp_path: Path) -> None:
    plan = make_plan(num_rows=3, samples_per_shard=3)
    samples = [
        dataclasses.replace(s, sample_id=str(s.row + 7)) for s in samples_of(["a", "b", "c"])
    ]
    write_samples(tmp_path, plan, samples)
    finalize(tmp_path)
    dataset = EmbeddingDataset(tmp_path)
    assert [dataset.index_of(number) for number in (7, 8, 9)] == [0, 1, 2]


def test_index_of(root: Path) -> None:
    dataset = EmbeddingDataset(root)
    assert [dataset.index_of(f"s{row}") for row in OK] == list(range(len(OK)))
    messages = {"s1": "status is null_text", "s3": "status is non_finite", "s99": "'s99' is not in"}
    for sample_id, message in {**messages, "\ud800": "is not in"}.items():
        with pytest.raises(SampleLookupError, match=message) as caught:
            dataset.index_of(sample_id)
        assert isinstance(caught.value, (InputError, KeyError))
        assert not str(caught.value).startswith(("'", '"'))


def test_what_was_encoded(root: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path / "more", ["", "x y"], first=100)
    dataset = EmbeddingDataset([root, tmp_path / "more"])
    texts = [TEXTS[row] for row in OK] + ["", "x y"]
    assert [dataset.encoded_text(i) for i in range(len(dataset))] == texts
    columns = list(dataset.columns("text_sha256", "t5_tokens"))
    found = [pair for part in columns for pair in zip(*part.values(), strict=True)]
    assert found == [
        (hashlib.sha256(str(t).encode()).hexdigest(), len(str(t).split()) + 1) for t in texts
    ]
    with pytest.raises(InputError, match=r"manifest.parquet has no columns \['nothing'\]"):
        list(dataset.columns("nothing"))
    flip(tmp_path / "more" / "manifest.parquet")
    with pytest.raises(VerificationError, match=r"manifest.parquet is damaged.*finalize"):
        list(dataset.columns("text_sha256"))


def test_ids_lengths_and_tokens(root: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path / "more", ["x y", "z"], first=100)
    more = EmbeddingDataset(tmp_path / "more")
    for dataset in (EmbeddingDataset(root), more, EmbeddingDataset([tmp_path / "more", root])):
        wanted = [dataset[i] for i in range(len(dataset))]
        ids = pickle.loads(pickle.dumps(dataset)).ids
        assert list(ids) == ids[:] == [sample["id"] for sample in wanted]
        assert (len(ids), ids[-1], ids[1:5:2]) == (len(wanted), list(ids)[-1], list(ids)[1:5:2])
        assert "s4" not in more.ids
        assert dataset.lengths["t5"].tolist() == [len(sample["text_t5"]) for sample in wanted]
        assert dataset.lengths["clip"].tolist() == [1] * len(wanted)
        for name in ("clip", "t5"):
            assert dataset.tokens[name].tolist() == dataset.lengths["t5"].tolist()
    assert isinstance(more.lengths["t5"].base, np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        dataset.tokens["t5"][0] = 1
    assert repr(more.ids) == "SampleIds(2: 's100', 's101')"


def test_ids_of_many_samples_are_read_in_parts(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_module, "IDS_AT_ONCE", 4)
    assert list(EmbeddingDataset(root).ids) == [f"s{row}" for row in OK]


@pytest.mark.parametrize("attention_mask", ["none", "padding"])
def test_the_token_mask_is_the_tokenizers(
    tmp_path: Path, tiny_t5: Path, tiny_clip: Path, attention_mask: str
) -> None:
    """A model may mask pads that its encoder attended (LTX-Video): they are stored, and named."""
    texts = ["a fox", "", "a red fox jumps over " * 20, "two ships"]
    captions = write_captions(tmp_path / "captions.parquet", texts)
    fields = {"outputs": ["pooled", "hidden"]}
    job = write_job(tmp_path, captions, tiny_t5, tiny_clip, attention_mask=attention_mask)
    edit(job, "encoders.clip", **fields)
    expect(0, "run", job)
    dataset = EmbeddingDataset(tmp_path / "out")
    batch = next(iter(EmbeddingLoader(dataset, 4, shuffle=False, num_workers=1)))
    for name, folder, length in (("t5", tiny_t5, 24), ("clip_hidden", tiny_clip, 77)):
        tokenize = AutoTokenizer.from_pretrained(folder)
        options = {"padding": "max_length", "truncation": True, "max_length": length}
        wanted = torch.tensor(tokenize(texts, **options)["attention_mask"]).bool()
        mask, null = f"text_{name}_token_mask", dataset.null
        if name == "t5" and attention_mask == "padding":
            assert torch.equal(batch[mask], wanted[:, : batch[mask].shape[1]])
            assert torch.equal(batch[mask], batch["text_t5_mask"])
            assert null[mask].all()
            continue
        assert torch.equal(batch[mask], wanted)
        assert batch[f"text_{name}_mask"].all()
        assert torch.equal(null[mask], wanted[1])
        assert torch.equal(dataset[3][mask], wanted[3])
        assert dataset.tokens[dataset.tensors[name].encoder].tolist() == wanted.sum(1).tolist()
    dropped = ConditionDropout(dataset, 1.0)(batch)
    empty = collate_embeddings([dataset[1]])
    for key in empty.keys() - {"id"}:
        for line in dropped[key]:
            own = line[: empty[key].shape[1]] if line.ndim else line
            assert torch.equal(own, empty[key][0]), key
            assert line.ndim == 0 or not line[len(own) :].any(), key


def test_nothing_is_mapped_until_it_is_touched(root: Path) -> None:
    dataset = EmbeddingDataset(root, max_open_shards=2)
    assert len(dataset) == 6
    assert dataset._folders[0]._index is None
    for i in range(6):
        check(dataset[i], OK[i])
        assert len(dataset._shards) <= 2
    assert list(dataset._shards) == [(0, 1), (0, 2)]  # the last used


def test_relative_path_survives_another_folder(
    root: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(root.parent)
    dataset = EmbeddingDataset("out")
    monkeypatch.chdir(tmp_path)
    check(dataset[0], 0)


# --- processes and threads ------------------------------------------------------------------------


class Subclass(EmbeddingDataset):
    """What people do: one more field and one more key."""

    def __init__(self, path: Path, tag: int) -> None:
        super().__init__(path)
        self.tag = tag

    def __getitem__(self, i: int) -> dict[str, Any]:
        return {**super().__getitem__(i), "tag": self.tag}


def test_pickle_holds_no_mapping(root: Path) -> None:
    dataset = Subclass(root, 7)
    dataset[0]
    assert dataset._shards
    payload = pickle.dumps(dataset)
    assert len(payload) < 8_000
    again = pickle.loads(payload)
    assert (again._shards, again._folders[0]._index) == ({}, None)
    assert [sample["tag"] for sample in again.__getitems__([1, 0])] == [7, 7]
    check({k: v for k, v in again[0].items() if k != "tag"}, 0)


@pytest.mark.parametrize(("workers", "context"), [(2, "fork"), (1, "spawn")])
def test_data_loader(root: Path, workers: int, context: str) -> None:
    dataset = EmbeddingDataset(root, "rows")
    dataset[0]  # a worker that is forked finds it open
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_size=4,
        num_workers=workers,
        multiprocessing_context=context,
        collate_fn=partial(collate_embeddings, length=6),
    )
    batches = list(loader)
    assert [tuple(batch["text_t5"].shape) for batch in batches] == [(4, 6, 4), (2, 6, 4)]
    for k, row in enumerate(OK):
        sample = {name: values[k % 4] for name, values in batches[k // 4].items()}
        for name in ("text_t5", "text_t5_token_mask"):
            sample[name] = sample[name][: sample["text_t5_length"]]
        del sample["text_t5_length"], sample["text_t5_mask"]
        check({name: sample[name] for name in sorted(sample)}, row)


def test_error_in_a_worker_keeps_its_kind(own_root: Path) -> None:
    paths_of(own_root, 1).shard.unlink()
    loader: DataLoader[Any] = DataLoader(
        EmbeddingDataset(own_root), num_workers=1, collate_fn=collate_embeddings
    )
    with pytest.raises(VerificationError, match="shard-000001"):
        list(loader)


def test_threads_share_one_dataset(root: Path) -> None:
    dataset = EmbeddingDataset(root, "rows", max_open_shards=1)

    def read(k: int) -> None:
        for i in np.random.default_rng(k).permutation(6).tolist():
            check(dataset[i], OK[i])

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(read, range(4)))
    assert len(dataset._shards) <= 4


def test_reading_imports_neither_transformers_nor_pyarrow(root: Path) -> None:
    code = (
        "import sys; from embed_precompute import ConditionDropout, EmbeddingDataset"
        ", EmbeddingLoader, prepare_ids"
        "; dataset = EmbeddingDataset(sys.argv[1])"
        "; ConditionDropout(dataset, 0.1)(next(iter(EmbeddingLoader(dataset, 2))))"
        "; print({'transformers', 'pyarrow', 'jsonargparse'} & set(sys.modules))"
    )
    assert run_code(code, root) == "set()\n"


# --- several folders ------------------------------------------------------------------------------


def test_folders_of_one_fingerprint_are_one_dataset(root: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path / "more", TEXTS, samples_per_shard=5, first=100)
    dataset = EmbeddingDataset([root, str(tmp_path / "more")])
    assert len(dataset) == 12
    for i in range(12):
        for each in (i, i - 12):
            check(dataset[each], OK[i % 6], first=100 if i >= 6 else 0)
    assert dataset.index_of("s105") == 9
    assert dataset.index_of("s5") == 3
    with pytest.raises(SampleLookupError, match=r"non_finite.*more --id s103"):
        dataset.index_of("s103")
    samples = pickle.loads(pickle.dumps(dataset)).__getitems__([11, 6, 0])
    assert [sample["id"] for sample in samples] == ["s107", "s100", "s0"]


def test_an_id_in_two_folders_is_refused(root: Path, tmp_path: Path) -> None:
    """It was a sample twice. A sample that failed in one of them, as s1 and s3, is none there."""
    write_dataset(tmp_path / "some", ["x", "y"], first=5)
    write_dataset(tmp_path / "mended", ["a caption now"], first=1)
    for folders, said in (
        (
            [root, root],
            r"6 ids have an embedding in more than one folder.*: 's\d', .*, \.\.\. \(in ",
        ),
        ([root, tmp_path / "some"], r"2 ids .*'s[56]', 's[56]' \(in .*out and .*some\)"),
        ([tmp_path / "mended", root, tmp_path / "mended"], r"1 ids .*'s1' \(in .*mended and "),
    ):
        with pytest.raises(ConflictError, match=said):
            EmbeddingDataset(folders)
    mended = EmbeddingDataset([root, tmp_path / "mended"])
    assert (len(mended), mended.index_of("s1")) == (7, 6)


def test_other_fingerprint_is_refused(root: Path, tmp_path: Path) -> None:
    write_dataset(tmp_path / "other", ["x"], normalize=["nfc"])
    message = r"captions.normalize: \[\] -> \['nfc'\]"
    with pytest.raises(ConflictError, match=message) as caught:
        EmbeddingDataset([root, tmp_path / "other"])
    assert str(root) in str(caught.value)
    assert str(tmp_path / "other") in str(caught.value)


# --- refused and damaged --------------------------------------------------------------------------


def test_what_is_no_finished_dataset(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="is not a folder"):
        EmbeddingDataset(tmp_path / "absent")
    with pytest.raises(InputError, match="holds no dataset"):
        EmbeddingDataset(tmp_path)
    with pytest.raises(InputError, match="no folder is given"):
        EmbeddingDataset([])
    (tmp_path / "file.parquet").touch()
    with pytest.raises(InputError, match=r"file\.parquet is not a folder"):
        EmbeddingDataset(tmp_path / "file.parquet")
    write_units(tmp_path, ["a"])
    with pytest.raises(IncompleteError, match="embed-precompute finalize"):
        EmbeddingDataset(tmp_path)
    options: Any
    for options in ({"verify": "row"}, {"max_open_shards": 0}):
        with pytest.raises(InputError, match="expected"):
            EmbeddingDataset(tmp_path, **options)


def drop_clip(manifest: dict[str, Any]) -> None:
    del manifest["tensors"]["clip"]
    for name in ("length_clip", "xxh3_clip"):
        del manifest["files"][f"index/{name}.npy"]


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda each: each["spec"]["output"].update(codec="zstd"), "codec is 'zstd'.*final"),
        (lambda manifest: manifest.update(format_version=2), "format_version 2"),
        (drop_clip, "tensors are not those of its spec"),
    ],
)
def test_a_manifest_that_cannot_be_is_refused(own_root: Path, change: Any, said: str) -> None:
    """Also where its digest was made right: found in 10,000 mutated files."""
    rewrite_json(own_root / "manifest.json", change)
    with pytest.raises(VerificationError, match=said):
        EmbeddingDataset(own_root)


def test_finalised_again_while_open(own_root: Path) -> None:
    dataset = EmbeddingDataset(own_root)
    rewrite_json(own_root / "manifest.json", lambda manifest: manifest.update(environments=[]))
    with pytest.raises(VerificationError, match="open the dataset again"):
        dataset[0]


def change_index(root: Path, name: str, row: int, value: int) -> Path:
    path = root / "index" / f"{name}.npy"
    array = np.load(path)
    array[row] = value
    np.save(path, array)
    return path


def test_every_changed_byte_of_a_row_is_found(own_root: Path) -> None:
    path = paths_of(own_root, 1).shard
    sound = path.read_bytes()
    # Unit 1 stores "a b c" and "d e" ("nan" is not stored): (3 + 4 * 4) and (3 + 3 * 4) values.
    num_bytes = 2 * (3 + 16 + 3 + 12)
    for offset in range(len(sound) - num_bytes, len(sound)):
        damaged = bytearray(sound)
        damaged[offset] ^= 1 << (offset % 8)
        path.write_bytes(damaged)
        dataset = EmbeddingDataset(own_root, "rows")
        with pytest.raises(VerificationError, match=r"shard-000001.*sample 's[45]'.*checksum"):
            dataset.__getitems__([2, 3])
        check(dataset[0], 0)


def test_damaged_null_is_found(own_root: Path) -> None:
    flip(read_null_record(own_root).shard_path(own_root))
    with pytest.raises(VerificationError, match=r"null-\w+\.safetensors is damaged: text_t5"):
        _ = EmbeddingDataset(own_root, "rows").null


@pytest.mark.parametrize(
    ("name", "value"), [("index", 99), ("index", -7), ("shard", 99), ("shard", -1), ("ok", -1)]
)
def test_damaged_index_does_not_end_a_loop(own_root: Path, name: str, value: int) -> None:
    change_index(own_root, name, -1, value)
    for verify in ("never", "rows"):
        with pytest.raises(VerificationError):
            list(EmbeddingDataset(own_root, verify))  # type: ignore[arg-type]
    if name == "ok":
        with pytest.raises(VerificationError, match=r"ok\.npy does not rise"):
            list(EmbeddingDataset(own_root).ids)
        with pytest.raises(VerificationError, match=r"ok\.npy does not rise"):
            _ = EmbeddingDataset(own_root).tokens


def test_row_of_another_length_is_found(own_root: Path) -> None:
    path = change_index(own_root, "length_t5", 0, 3)
    with pytest.raises(VerificationError, match=r"'s0': found 4 vectors.*the index says 3"):
        EmbeddingDataset(own_root)[0]
    path.unlink()
    with pytest.raises(VerificationError, match=r"length_t5.npy"):
        EmbeddingDataset(own_root)[0]
    finalize(own_root)
    check(EmbeddingDataset(own_root)[0], 0)


# --- collate --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("length", [None, 5, 3])
def test_collate(dtype: torch.dtype, length: int | None) -> None:
    samples = [
        {"id": "a", "text_t5": torch.ones(2, 4, dtype=dtype), "text_clip": torch.ones(3)},
        {"id": "b", "text_t5": torch.full((3, 4), 2, dtype=dtype), "text_clip": torch.zeros(3)},
    ]
    batch = collate_embeddings(samples, length)
    assert list(batch) == ["id", "text_t5", "text_t5_length", "text_t5_mask", "text_clip"]
    assert batch["id"] == ["a", "b"]
    assert batch["text_t5"].dtype == dtype
    assert batch["text_t5"].shape == (2, length or 3, 4)
    assert batch["text_t5_length"].tolist() == [2, 3]
    assert batch["text_t5_length"].dtype == torch.int64
    mask = batch["text_t5_mask"]
    assert mask.dtype == torch.bool
    assert mask.sum(1).tolist() == [2, 3]
    assert mask[0, :2].all()
    assert torch.equal(batch["text_t5"][..., 0].ne(0), mask)
    assert torch.equal(batch["text_clip"], torch.tensor([[1.0] * 3, [0.0] * 3]))
    without_ids = [{"text_t5": sample["text_t5"]} for sample in samples]  # the null embedding too
    assert torch.equal(collate_embeddings(without_ids, length)["text_t5_mask"], mask)


def test_collate_takes_what_else_a_sample_has() -> None:
    """A user's data set returns its video and the embeddings in one dict."""
    samples = [
        {"video": torch.full((3, 2), k), "fps": 24.0 + k, "text": f"t{k}", "size": {"w": k}}
        | {"id": f"v{k}", "text_t5": torch.ones(k + 1, 4), "text_clip": torch.ones(3)}
        for k in range(2)
    ]
    batch = collate_embeddings(samples)
    assert batch["video"].shape == (2, 3, 2)
    assert batch["fps"].tolist() == [24.0, 25.0]
    assert batch["size"]["w"].tolist() == [0, 1]
    assert (batch["text"], batch["id"]) == (["t0", "t1"], ["v0", "v1"])
    assert batch["text_t5_length"].tolist() == [1, 2]
    assert "text_t5_token_mask" not in batch, "nobody said which are tokens"


def test_collate_refuses_what_it_does_not_know() -> None:
    one: dict[str, Any] = {"id": "a", "text_t5": torch.ones(2, 4)}
    longer = {"id": "b", "text_t5": torch.ones(3, 4)}
    for samples, said in (
        ([one, longer], r"sample 'b' has 3 vectors in text_t5.*length=2"),  # nothing is cut
        ([], "without samples"),
        ([one, {"id": "b"}], "have keys"),
        ([{**one, "video": torch.ones(1)}, {**one, "video": torch.ones(2)}], "'video' of the sam"),
        ([{**one, "video": None}], r"'video' of the samples a makes no batch: .*NoneType"),
        ([{**one, "text_t5_length": torch.ones(3)}], "text_t5_length"),
    ):
        with pytest.raises(InputError, match=said):
            collate_embeddings(samples, 2)
