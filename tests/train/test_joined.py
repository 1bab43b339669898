"""JoinedDataset: videos and embeddings by id, one caption of several in each epoch."""

from __future__ import annotations

import copy
import logging
import pickle
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from handmade import embedding, make_plan, write_dataset, write_samples
from torch.utils.data import DataLoader, Dataset, Subset

from embed_precompute import EmbeddingDataset, EmbeddingLoader, JoinedDataset, collate_embeddings
from embed_precompute.errors import ConflictError, InputError
from embed_precompute.samples import Sample, Status
from embed_precompute.store.manifest import finalize

LISTS = [["v#0", "v#1", "v#2"], ["a#b#0", "a#b#1"]]
COLUMNS = [["x#short", "x#long"]]
SINGLES = [["w"], ["w#0"], ["null"], ["7"], ["null#0"], ["null#1"]]
IDS = [sample_id for row in (*LISTS, *COLUMNS, *SINGLES) for sample_id in row]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Three folders: of lists of captions, of two columns, and of one caption a row."""
    folders = []
    for rows in (LISTS, COLUMNS, SINGLES):
        folders.append(tmp_path_factory.mktemp("joined") / "out")
        samples = [
            Sample(sample_id, row, f"caption {sample_id}")
            if sample_id != "null"
            else Sample("null", row, None, Status.NULL_TEXT, "text is null")
            for row, ids in enumerate(rows)
            for sample_id in ids
        ]
        names = ("short", "long") if rows is COLUMNS else "text"
        plan = make_plan(len(rows), 20, len(samples), text_column=names)
        write_samples(folders[-1], plan, samples)
        finalize(folders[-1])
    return folders


class Videos(Dataset[dict[str, Any]]):
    """What a user has: clips that are slow to load, with their ids in a table."""

    def __init__(self, names: list[str]) -> None:
        self.names, self.loaded = names, 0

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: int) -> dict[str, Any]:
        self.loaded += 1
        return {"video": torch.full((2, 3), i), "name": self.names[i]}


def captions(joined: JoinedDataset) -> list[str]:
    return [sample["id"] for sample in joined]


def test_a_sample_is_the_video_and_its_embedding(root: list[Path]) -> None:
    embeddings, videos = EmbeddingDataset(root), Videos(["7", "w", "7"])
    joined = JoinedDataset(videos, embeddings, on=videos.names)
    assert videos.loaded == 0, "no video is loaded before training"
    assert (len(joined), captions(joined)) == (3, ["7", "w", "7"])
    assert list(joined[-1]) == ["video", "name", *embeddings[0]]
    assert joined[2]["video"].tolist() == [[2] * 3] * 2
    assert torch.equal(joined[1]["text_t5"], embedding("t5", "caption w"))
    with pytest.raises(IndexError):
        joined[3]
    batch = next(iter(DataLoader(joined, batch_size=3, collate_fn=collate_embeddings)))
    assert batch["video"].shape == (3, 2, 3)
    assert repr(joined).startswith("JoinedDataset(3 videos of Videos, 3 captions of EmbeddingData")


def test_where_the_ids_are(root: list[Path]) -> None:
    embeddings = EmbeddingDataset(root)
    dicts = [{"id": 7, "fps": 24}, {"id": "w", "fps": 25}]
    by_key = JoinedDataset(dicts, embeddings)
    assert [(sample["id"], sample["fps"]) for sample in by_key] == [("7", 24), ("w", 25)]
    renamed = [{"clip": each["id"]} for each in dicts]
    assert (
        JoinedDataset(renamed, embeddings, on="clip")[0].items() >= {"id": "7", "clip": 7}.items()
    )
    alone = JoinedDataset(["w", np.int64(7)], embeddings)
    assert list(alone[0]) == list(embeddings[0])
    assert captions(alone) == ["w", "7"]
    assert captions(JoinedDataset(embeddings.ids, embeddings)) == list(embeddings.ids)


# --- several captions -----------------------------------------------------------------------------


def test_each_caption_has_its_turn(root: list[Path]) -> None:
    """As many epochs as captions give each once; `w` has a caption of exactly its id."""
    joined = JoinedDataset(["v", "x", "w", "a#b"], EmbeddingDataset(root), seed=3)
    epochs = []
    for epoch in range(6):
        joined.set_epoch(epoch)
        epochs.append(captions(joined))
    for k, video in enumerate(("v", "x", "w", "a#b")):
        wanted = [i for i in IDS if i.rpartition("#")[0] == video] if video != "w" else ["w"]
        assert Counter(found[k] for found in epochs) == dict.fromkeys(wanted, 6 // len(wanted))
    joined.set_epoch(1)
    assert captions(joined) == epochs[1]
    assert captions(copy.deepcopy(joined)) == epochs[1]


def test_the_first_turn_differs_between_videos_and_seeds(root: list[Path]) -> None:
    embeddings = EmbeddingDataset(root)
    first = captions(JoinedDataset(["v"] * 300, embeddings))
    assert min(Counter(first).values()) > 60
    assert captions(JoinedDataset(["v"] * 300, embeddings)) == first
    assert captions(JoinedDataset(["v"] * 300, embeddings, seed=1)) != first


@pytest.mark.parametrize("context", ["fork", "spawn"])
def test_workers_that_stay_see_the_epoch(root: list[Path], context: str) -> None:
    joined = JoinedDataset(["v"] * 4, EmbeddingDataset(root))
    options: Any = {"num_workers": 1, "multiprocessing_context": context, "batch_size": 4}
    plain = DataLoader(joined, collate_fn=collate_embeddings, persistent_workers=True, **options)
    loader = EmbeddingLoader(Subset(joined, range(4)), shuffle=False, **options)
    seen = []
    for epoch in range(3):
        joined.set_epoch(epoch)
        wanted = captions(joined)
        assert next(iter(plain))["id"] == wanted
        joined.set_epoch(99)  # the loader sets it, through the subset
        assert next(iter(loader))["id"] == wanted
        loader.set_epoch(epoch + 1)
        seen.append(wanted)
    assert len({tuple(each) for each in seen}) == 3


def test_a_resumed_loader_has_the_same_captions(root: list[Path]) -> None:
    embeddings = EmbeddingDataset(root)
    ids = ["v", "x", "a#b"] * 4

    def made(seed: int = 0, names: list[str] = ids) -> EmbeddingLoader:
        return EmbeddingLoader(JoinedDataset(names, embeddings, seed=seed), 2)

    first = made()
    seen = [batch["id"] for _ in range(2) for batch in first]
    second = made()
    list(second)
    iterator = iter(second)
    next(iterator)
    third = made()
    third.load_state_dict(second.state_dict())
    assert [batch["id"] for batch in third] == seen[7:]
    for other in (made(seed=1), made(names=ids[::-1])):
        with pytest.raises(ConflictError, match="another dataset: its samples_digest"):
            other.load_state_dict(second.state_dict())


def test_a_pickle_holds_neither_ids_nor_mapped_files(root: list[Path]) -> None:
    embeddings = EmbeddingDataset(root)
    sizes = [len(pickle.dumps(JoinedDataset(["v"] * n, embeddings))) for n in (10, 1010)]
    names = len(pickle.dumps(["v"] * 1010)) - len(pickle.dumps(["v"] * 10))
    assert sizes[1] - sizes[0] - names < 1000 * 33


def test_captions_that_two_folders_have(root: list[Path], tmp_path: Path) -> None:
    """As `index_of`: the first folder's."""
    write_dataset(tmp_path, ["new s0", "new s1"])
    embeddings = EmbeddingDataset([tmp_path, *root, *root])
    joined = JoinedDataset(["s1", "v", "w"], embeddings)
    assert [len(embeddings), int(joined._counts.sum())] == [26, 5]
    assert joined.caption_of(2) == embeddings.index_of("w") == 9


def test_a_caption_of_another_row_is_never_taken(root: list[Path], tmp_path: Path) -> None:
    """Ids with a # of their own, where a row has one caption: `null#1` is no caption of `null`."""
    embeddings = EmbeddingDataset(root)
    assert captions(JoinedDataset(["null#0", "null#1"], embeddings)) == ["null#0", "null#1"]
    with pytest.raises(InputError, match=r"'null' has no embedding: its status is null_text"):
        JoinedDataset(["null"], embeddings)
    samples = [Sample(sample_id, row, "text") for row, sample_id in enumerate(["u#0", "y#7"])]
    write_samples(tmp_path, make_plan(2, 2), samples)
    finalize(tmp_path)
    of_one = EmbeddingDataset(tmp_path)
    assert captions(JoinedDataset(["u"], of_one)) == ["u#0"], "a list of one caption"
    with pytest.raises(InputError, match="sample 'y' is not in"):
        JoinedDataset(["y"], of_one)


# --- refused --------------------------------------------------------------------------------------


def test_missing_ids_are_named_before_training(
    root: list[Path], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("embed_precompute"), "propagate", True)
    embeddings, names = EmbeddingDataset(root), ["nope", "v", "null", "7", "x#", "y", "z"]
    said = (
        r"5 of 7 videos have no embedding: sample 'nope' is not in .*; sample 'null' has no "
        r"embedding: its status is null_text.*; sample 'x#' is not in .*; and 2 more\. Leave them"
    )
    videos = Videos(names)
    with pytest.raises(InputError, match=said):
        JoinedDataset(videos, embeddings, on=names)
    with caplog.at_level(logging.WARNING):
        joined = JoinedDataset(videos, embeddings, on=names, on_missing="drop")
    assert "5 of 7 videos have no embedding" in caplog.text
    assert (joined.num_dropped, len(joined), videos.loaded) == (5, 2, 0)
    assert [sample["name"] for sample in joined] == ["v", "7"]
    with pytest.raises(InputError, match="2 of 2 videos"):
        JoinedDataset(["y", ""], embeddings, on_missing="drop")


def test_what_cannot_be_joined(root: list[Path]) -> None:
    embeddings = EmbeddingDataset(root)
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (Videos(["w"]), {}, r"on='id' would load every Videos video for its id. Give the ids"),
        (Videos(["w"]), {"on": ["w", "7"]}, "`on` has 2 ids for 1 videos"),
        ([{"id": "w"}, {"name": "7"}], {}, "video 1 has no key 'id', only name"),
        ([{"id": 7.0}], {}, r"the id of video 0 is 7.0 \(float\)"),
        ([None], {}, "the id of video 0 is None"),
        ([], {}, "there are no videos"),
        (["w"], {"on_missing": "skip"}, "on_missing is 'skip'"),
    ]
    for videos, options, said in cases:
        with pytest.raises(InputError, match=said):
            JoinedDataset(videos, embeddings, **options)


def test_a_video_that_does_not_fit(root: list[Path]) -> None:
    embeddings = EmbeddingDataset(root)
    for video, said in (
        ((1, 2), "video 0 is a tuple: expected a dict"),
        ({"id": "v"}, "video 0 has the id 'v', but is joined to the sample 'w'"),
        ({"text_t5": 1}, r"both have \['text_t5'\]"),
    ):
        joined = JoinedDataset([video], embeddings, on=["w"])
        with pytest.raises(InputError, match=said):
            joined[0]
    with pytest.raises(InputError, match=r"both have \['id'\]"):
        JoinedDataset([{"name": "w", "id": 5}], embeddings, on="name")[0]
