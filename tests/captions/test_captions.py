"""Captions: every kind of table becomes the samples that its rows say, in plan order."""

from __future__ import annotations

import hashlib
import logging
import math
import shutil
import types
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs
import pytest
import xxhash
from caption_case import opened, rows, samples_of, write
from handmade import open_below

from embed_precompute.captions import table as table_module
from embed_precompute.captions.files import refuse_output_inside
from embed_precompute.captions.reader import RowCursor
from embed_precompute.captions.recipes import OpenSoraRecipe, TemplateRecipe
from embed_precompute.captions.table import Scan
from embed_precompute.errors import ConflictError, InputError
from embed_precompute.samples import Sample, Status


def paths(path: Path | str) -> list[str]:
    return [file.path for file in opened(path).files]


# --- files -------------------------------------------------------------------------------------


@pytest.mark.parametrize("num_columns", [0, 2000])
def test_one_file_is_its_samples_and_its_footer(tmp_path: Path, num_columns: int) -> None:
    """Also where the footer is larger than the first read of it."""
    wide = {**rows(3), **{f"column_{i:05d}": [1, 2, 3] for i in range(num_columns)}}
    file = write(tmp_path / "a.parquet", wide)
    raw = file.read_bytes()
    length = int.from_bytes(raw[-8:-4], "little")
    assert (length > 64 * 1024) == (num_columns > 0)
    table = opened(file)
    (found,) = table.files
    assert (found.path, found.bytes, found.rows) == ("a.parquet", len(raw), 3)
    assert found.footer_sha256 == hashlib.sha256(raw[-8 - length : -8]).hexdigest()
    assert found.content_xxh3 == xxhash.xxh3_128_hexdigest(raw)
    assert samples_of(file) == [Sample(f"c{i}", i, f"caption {i}") for i in range(3)]
    assert (table.num_rows, table.is_list) == (3, False)
    assert table.scan() == Scan(3, 3, None, {})


def test_a_folder_is_nested_sorted_bytewise_and_free_of_other_files(tmp_path: Path) -> None:
    names = ["b.parquet", "a/z.parquet", "a/deep/er/k.PQ", "a.parquet", "B.parquet", "é.parquet"]
    for i, name in enumerate(names):
        write(tmp_path / name, rows(2, 10 * i))
    for name in ("_SUCCESS", ".hidden.parquet", "_temporary/x.parquet", ".git/y.parquet", "n.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"not parquet")
    expected = sorted(names, key=lambda name: name.encode())
    assert paths(f"{tmp_path}/") == expected
    samples = samples_of(tmp_path)
    ids = [f"c{10 * names.index(name) + k}" for name in expected for k in (0, 1)]
    assert [(s.sample_id, s.row) for s in samples] == list(zip(ids, range(12), strict=True))


def test_links_are_followed_once_and_never_in_a_loop(tmp_path: Path) -> None:
    real = write(tmp_path / "blobs" / "0a1b", rows(2))
    linked = write(tmp_path / "elsewhere" / "z.parquet", rows(2, 5)).parent
    folder = tmp_path / "snapshot"
    write(folder / "own" / "b.parquet", rows(2, 9))
    (folder / "a.parquet").symlink_to(real)
    (folder / "again").symlink_to(folder / "own")
    (folder / "loop").symlink_to(folder)
    (folder / "itself").symlink_to(folder / "itself")
    (folder / "up").symlink_to(tmp_path)
    (folder / "more").symlink_to(linked)
    (folder / "once more").symlink_to(linked)
    expected = ["a.parquet", "more/z.parquet", "own/b.parquet"]
    assert paths(folder) == paths(folder / "**") == expected


def test_globs(tmp_path: Path) -> None:
    names = ["x/a.parquet", "x/b.parquet", "y/a.parquet", "x/c.data", "x/_SUCCESS"]
    names += ["x/part.parquet/p0.parquet", "take[1].parquet", "_h/d.parquet"]
    for i, name in enumerate(names):
        write(tmp_path / name, rows(1, i))
    assert paths(tmp_path / "*" / "a.parquet") == ["x/a.parquet", "y/a.parquet"]
    assert paths(tmp_path / "**" / "[bc].*") == ["x/b.parquet"]
    assert paths(tmp_path / "x" / "*.data") == ["c.data"]
    assert paths(tmp_path / "x" / "*") == ["a.parquet", "b.parquet", "part.parquet/p0.parquet"]
    assert paths(tmp_path / "?" / "[!a].parquet") == ["x/b.parquet"]
    assert paths(tmp_path / "_h" / "*.parquet") == ["d.parquet"]
    assert paths(tmp_path / "_*") == ["_h/d.parquet"]
    assert paths(tmp_path / "take[1].parquet") == ["take[1].parquet"]


def test_file_uri_and_relative_path_give_the_same_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path / "my captions" / "a.parquet", rows(2))
    write(tmp_path / "my captions" / "s" / "b.parquet", rows(2, 2))
    plain = opened(tmp_path / "my captions")
    uri = f"file://{tmp_path}/my%20captions"
    assert opened(uri).files == plain.files
    assert paths(uri + "/*.parquet") == ["a.parquet"]
    monkeypatch.chdir(tmp_path)
    assert opened("my captions").files == plain.files


def test_other_uris_go_through_pyarrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same search on a file system that is not the local one."""
    for i, name in enumerate(["d/a.parquet", "d/e/b.parquet", "d/e/_c.parquet", "d/n.txt"]):
        write(tmp_path / "bucket" / name, rows(2, 10 * i))
    remote = pyarrow.fs.SubTreeFileSystem(str(tmp_path), pyarrow.fs.LocalFileSystem())
    asked: list[str] = []

    def from_uri(uri: str) -> tuple[Any, str]:
        asked.append(uri)
        return remote, uri.partition("://")[2].partition("?")[0]

    monkeypatch.setattr(pyarrow.fs, "FileSystem", types.SimpleNamespace(from_uri=from_uri))
    assert paths("s3://bucket/d?region=eu") == ["a.parquet", "e/b.parquet"]
    assert asked == ["s3://bucket/d?region=eu"]
    assert paths("s3://bucket/**/[ab].parquet") == ["d/a.parquet", "d/e/b.parquet"]
    found = samples_of("s3://bucket/**/[ab].parquet")
    assert [s.sample_id for s in found] == ["c0", "c1", "c10", "c11"]
    assert paths("s3://bucket/d/*.parquet") == ["a.parquet"]
    assert paths("s3://bucket/[!x]") == ["d/a.parquet", "d/e/b.parquet"]
    assert paths("s3://bucket/d/a.parquet") == ["a.parquet"]
    with pytest.raises(InputError, match="does not exist"):
        opened("s3://bucket/nowhere")


def test_datasets_of_ours_are_skipped_and_named(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(logging.getLogger("embed_precompute"), "propagate", True)
    write(tmp_path / "data" / "a.parquet", rows(2))
    old = tmp_path / "data" / "old" / "out"  # with the files by which a dataset of ours is known
    write(old / "shards" / "000" / "shard-000000-0123456789abcdef.rows.parquet", rows(2, 90))
    write(old / "manifest.parquet", rows(2, 90))
    (old / "plan.json").write_text("{}")
    assert paths(tmp_path / "data") == ["a.parquet"]
    assert f"{old} holds a dataset of ours" in caplog.text
    (old / "plan.json").rename(old / "manifest.json")  # a dataset that lost its plan
    export = tmp_path / "data" / "exported"
    write(export / "table.parquet", rows(2))
    for name in ("source.json", "null_t5.pt"):
        (export / name).touch()
    assert paths(tmp_path / "data") == ["a.parquet"]
    assert f"{export} holds an export of ours" in caplog.text
    assert paths(tmp_path / "**" / "*.parquet") == ["data/a.parquet"]
    with pytest.raises(InputError, match="holds no caption table"):
        opened(old)


def test_an_output_inside_the_captions_is_refused(tmp_path: Path) -> None:
    data = tmp_path / "data"
    file = write(data / "a.parquet", rows(2))
    (tmp_path / "link").symlink_to(data)
    allowed = [
        (data, tmp_path / "out"),
        (data, tmp_path / "data2"),
        (data, data / "_out"),  # never looked into
        (file, data / "out"),
        (f"{data}/*.parquet", data / "out"),
        ("s3://bucket/data", data / "out"),
    ]
    for captions, output in allowed:
        refuse_output_inside(str(captions), output)
    refused = [
        (data, data),
        (data, data / "deep" / "out"),
        (f"file://{data}", data / "out"),
        (data, tmp_path / "link" / "out"),
        (f"{data}/*.parquet", data),
        (f"{data}/**/*.parquet", data / "out"),
    ]
    for captions, output in refused:
        with pytest.raises(InputError, match=r"output\.path .* lies inside captions\.path"):
            refuse_output_inside(str(captions), output)


def test_a_file_that_changes_after_open_is_a_conflict(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", rows(3))
    table = opened(file)
    write(file, rows(4))
    with pytest.raises(ConflictError, match=r"a\.parquet changed since it was planned"):
        table.scan()


# --- rows --------------------------------------------------------------------------------------


def folder_of_groups(tmp_path: Path) -> Path:
    """10 + 0 + 23 rows in row groups of 4, 7 and an empty file between."""
    write(tmp_path / "a.parquet", rows(10), row_group_size=4)
    empty = {"id": pa.array([], pa.string()), "text": pa.array([], pa.string())}
    write(tmp_path / "b.parquet", empty)
    write(tmp_path / "c.parquet", rows(23, 10), row_group_size=7)
    return tmp_path


@pytest.mark.parametrize("rows_at_once", [1, 3, 7, 33])
def test_any_range_crosses_row_groups_and_files(tmp_path: Path, rows_at_once: int) -> None:
    reader = opened(folder_of_groups(tmp_path)).reader()
    samples: list[Sample] = []
    for first in range(0, 33, rows_at_once):
        samples += reader.read(first, min(rows_at_once, 33 - first))
    assert samples == [Sample(f"c{i}", i, f"caption {i}") for i in range(33)]


def test_the_cursor_goes_forward_once_and_back_when_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = opened(folder_of_groups(tmp_path))
    decoded: list[int] = []
    original = RowCursor._open_group

    def counted(self: RowCursor, row: int) -> None:
        decoded.append(row)
        original(self, row)

    monkeypatch.setattr(RowCursor, "_open_group", counted)
    reader = table.reader()
    for first in (0, 2, 3, 9, 11, 16, 30):  # skips a group; rows of one group share its decode
        assert [s.row for s in reader.read(first, 2)] == [first, first + 1]
    assert decoded == [0, 4, 9, 10, 17, 30, 31]
    assert [s.row for s in reader.read(1, 3)] == [1, 2, 3]  # back
    assert [s.sample_id for s in reader.read(0, 33)] == [f"c{i}" for i in range(33)]
    assert reader.read(5, 0) == []
    reader.close()
    assert [s.row for s in reader.read(20, 1)] == [20]
    with pytest.raises(ValueError, match="of 33"):
        reader.read(30, 4)
    table.scan()
    reader.close()
    assert open_below(tmp_path) == []


def test_memory_is_a_batch_whatever_the_row_group(tmp_path: Path) -> None:
    """Wide rows make small batches; narrow rows never more than the cap."""
    wide = {"id": list(range(1000)), "text": [f"{i} " + "x" * 40_000 for i in range(1000)]}
    file = write(tmp_path / "w.parquet", wide, compression="zstd", use_dictionary=False)
    cursor = RowCursor(opened(file).row_map, ["text"], 2048)
    batches = [batch for _, batch in cursor.batches(0, 1000)]
    assert sum(map(len, batches)) == 1000
    assert max(batch.nbytes for batch in batches) < 8 << 20
    file = write(tmp_path / "n.parquet", {"id": list(range(50_000)), "text": ["x"] * 50_000})
    narrow = RowCursor(opened(file).row_map, ["text"], 2048)
    assert max(len(batch) for _, batch in narrow.batches(0, 50_000)) == 2048


# --- types -------------------------------------------------------------------------------------

STRINGS = (pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int8(), pa.string()))
LISTS = [pa.list_(each) for each in STRINGS] + [pa.large_list(each) for each in STRINGS[:3]]


@pytest.mark.parametrize("arrow_type", STRINGS, ids=str)
def test_scalar_text_types(tmp_path: Path, arrow_type: Any) -> None:
    texts = ["a dog", "", None, "naïve ☕ 犬", "a dog", "x" * 300]
    array = pa.array(texts, pa.string()).cast(arrow_type)
    file = write(tmp_path / "a.parquet", {"id": range(6), "text": array}, row_group_size=4)
    expected = [Sample(str(i), i, text) for i, text in enumerate(texts)]
    expected[2] = Sample("2", 2, None, Status.NULL_TEXT, "column 'text' is null")
    assert samples_of(file) == expected


@pytest.mark.parametrize("arrow_type", LISTS, ids=str)
def test_list_text_gives_a_sample_per_caption(tmp_path: Path, arrow_type: Any) -> None:
    lists = [["a", "b"], [], None, ["c", None, ""], ["d"]]
    columns = {"id": ["r", "s", "t", "u", "v"], "text": pa.array(lists, arrow_type)}
    table = opened(write(tmp_path / "a.parquet", columns, row_group_size=2))
    assert (table.is_list, table.scan()) == (True, Scan(5, 8, None, {}))
    expected = [
        Sample("r#0", 0, "a"),
        Sample("r#1", 0, "b"),
        Sample("s#0", 1, None, Status.EMPTY_LIST, "column 'text' is an empty list"),
        Sample("t#0", 2, None, Status.NULL_TEXT, "column 'text' is null"),
        Sample("u#0", 3, "c"),
        Sample("u#1", 3, None, Status.NULL_TEXT, "entry 1 of column 'text' is null"),
        Sample("u#2", 3, ""),
        Sample("v#0", 4, "d"),
    ]
    assert table.reader().read(0, 5) == expected
    assert table.reader().read(3, 1) == expected[4:7]
    assert table.reader().read(1, 2) == expected[2:4]


def test_ids(tmp_path: Path) -> None:
    for array, expected in (
        (pa.array([7, -3, 2**40]), ["7", "-3", "1099511627776"]),
        (pa.array([7, 3, 2**64 - 1], pa.uint64()), ["7", "3", "18446744073709551615"]),
        (pa.array([1, 2, 3], pa.int8()), ["1", "2", "3"]),
        (pa.array(["b", "", "é"]), ["b", "", "é"]),
        (pa.array(["b", "a", "c"]).dictionary_encode(), ["b", "a", "c"]),
        (pa.array(["01", "1", "1#0"], pa.large_string()), ["01", "1", "1#0"]),
    ):
        file = write(tmp_path / "a.parquet", {"key": array, "cap": ["x", "y", "z"]})
        fields = {"id_column": "key", "text_column": "cap"}
        assert opened(file, **fields).scan().num_rows == 3
        assert [sample.sample_id for sample in samples_of(file, **fields)] == expected


def test_the_id_column_is_found(tmp_path: Path) -> None:
    columns = {"path": ["p"], "text": ["x"], "sample_id": ["s"], "id": ["i"]}
    for found in ("id", "sample_id", "path"):
        table = opened(write(tmp_path / "a.parquet", columns))
        assert table.config.id_column == found
        assert samples_of(tmp_path) == [Sample(found[0], 0, "x")]
        del columns[found]
    write(tmp_path / "a.parquet", columns)
    with pytest.raises(InputError, match=r"none of the columns id, sample_id, path .* row numbers"):
        opened(tmp_path)
    write(tmp_path / "a.parquet", {"id": ["i"], **columns})
    write(tmp_path / "b.parquet", {"path": ["p"], **columns})
    with pytest.raises(InputError, match=r"b\.parquet has no column 'id', in which .*a\.parquet"):
        opened(tmp_path)


# --- several text columns ----------------------------------------------------------------------

SHORT_LONG = {"id": ["x", "y", "x#short"], "short": ["a", None, "e"], "long": ["b", "d", ""]}
BOTH = ("short", "long")


def test_several_text_columns_are_several_samples(tmp_path: Path) -> None:
    """The id of a row may hold a `#`: the column is what follows the last one."""
    file = write(tmp_path / "a.parquet", {**SHORT_LONG, "fps": [8, 9, 10]}, row_group_size=2)
    expected = [
        Sample("x#short", 0, "a 8 FPS."),
        Sample("x#long", 0, "b 8 FPS."),
        Sample("y#short", 1, None, Status.NULL_TEXT, "column 'short' is null"),
        Sample("y#long", 1, "d 9 FPS."),
        Sample("x#short#short", 2, "e 10 FPS."),
        Sample("x#short#long", 2, " 10 FPS."),
    ]
    fields = {"text_column": BOTH, "recipe": OpenSoraRecipe()}
    table = opened(file, **fields)
    reader = table.reader()
    assert reader.read(0, 3) == expected
    assert (reader.noted, table.scan()) == ({"empty captions": 1}, Scan(3, 6, None, {}))
    assert [s.sample_id for s in samples_of(file, id_column=None, **fields)][:2] == [
        "0#short",
        "0#long",
    ]
    for id_column in ("id", None):  # without an id nothing needs to be read
        table = opened(file, id_column=id_column, **fields)
        for limit, scan in (
            (1, Scan(1, 1, 1, {})),
            (2, Scan(1, 2, None, {})),
            (3, Scan(2, 3, 1, {})),
            (9, Scan(3, 6, None, {})),
        ):
            assert table.scan(limit) == scan
            found = table.reader(scan.num_rows, scan.last_row_samples).read(0, scan.num_rows)
            assert [s.text for s in found] == [s.text for s in expected[:limit]]


def test_text_columns_that_cannot_be(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", {**SHORT_LONG, "all": [["x"]] * 3, "a#b": ["x"] * 3})
    for names, said in (
        ((), "text_column is "),
        (("short", "short"), "text_column is "),
        (("short", "a#b"), "without # in a name"),
        (("short", "lang"), "no column 'lang' .*mean 'long'"),
        (("short", "all"), "column 'all' .* expected string"),
    ):
        with pytest.raises(InputError, match=said):
            opened(file, text_column=names)


def test_no_id_column_counts_rows_over_files(tmp_path: Path) -> None:
    table = opened(folder_of_groups(tmp_path), id_column=None)
    samples = table.reader().read(0, 33)
    assert [sample.sample_id for sample in samples] == [str(i) for i in range(33)]
    assert (table.scan(), table.scan(limit=5)) == (Scan(33, 33, None, {}), Scan(5, 5, None, {}))


def test_ids_that_only_look_equal_are_no_duplicates(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Signed and unsigned ids of the same bits; different ids of the same hash."""
    write(tmp_path / "int" / "a.parquet", {"id": pa.array([-1]), "text": ["x"]})
    unsigned = pa.array([2**64 - 1], pa.uint64())
    write(tmp_path / "int" / "b.parquet", {"id": unsigned, "text": ["x"]})
    assert opened(tmp_path / "int").scan().num_rows == 2
    shutil.rmtree(tmp_path / "int")
    monkeypatch.setattr(table_module, "xxhash", types.SimpleNamespace(xxh3_64_intdigest=len))
    monkeypatch.setattr(table_module, "SUSPECTS", 1)
    assert opened(folder_of_groups(tmp_path)).scan().num_rows == 33
    write(tmp_path / "d.parquet", {"id": ["c100", "c32"], "text": ["x", "y"]})
    with pytest.raises(InputError, match=r"d\.parquet, row 1 .* repeats id 'c32'"):
        opened(tmp_path).scan()


# --- limits and added tokens -------------------------------------------------------------------


def test_a_limit_cuts_the_table(tmp_path: Path) -> None:
    table = opened(folder_of_groups(tmp_path))
    assert table.scan(limit=12) == Scan(12, 12, None, {})
    assert table.scan(limit=99) == Scan(33, 33, None, {})
    reader = table.reader(num_rows=12)
    assert len(reader.read(0, 12)) == 12
    with pytest.raises(ValueError, match="of 12"):
        reader.read(11, 2)
    with pytest.raises(InputError, match="--limit is 0"):
        table.scan(limit=0)
    repeated = {"id": ["a", "b", "a"], "text": ["x", "y", "z"]}
    file = write(tmp_path / "ids" / "a.parquet", repeated)
    assert opened(file).scan(limit=2).num_rows == 2  # the ids after it are not checked
    with pytest.raises(InputError, match="repeats id 'a'"):
        opened(file).scan()


@pytest.mark.parametrize("limit", range(1, 10))
def test_a_limit_may_cut_a_list(tmp_path: Path, limit: int) -> None:
    lists = [["a", "b", "c"], None, [], ["d", "e", "f"]]
    file = write(tmp_path / "a.parquet", {"id": range(4), "text": lists}, row_group_size=3)
    table = opened(file)
    scan = table.scan(limit)
    assert scan.num_samples == min(limit, 8)
    assert scan.num_rows == [1, 1, 1, 2, 3, 4, 4, 4, 4][limit - 1]
    assert scan.last_row_samples == [1, 2, None, None, None, 1, 2, None, None][limit - 1]
    reader = table.reader(scan.num_rows, scan.last_row_samples)
    assert reader.read(0, scan.num_rows) == samples_of(file)[:limit]


def test_added_tokens_are_counted(tmp_path: Path) -> None:
    columns = {**rows(5), "tokens": [1000, 0, 1000, 1001, 0], "other": pa.array([1] * 5, pa.int8())}
    file = write(tmp_path / "a.parquet", columns, row_group_size=2)
    table = opened(file, ("tokens", "other", "tokens"))
    assert table.scan().added_tokens == {"tokens": {0: 2, 1000: 2, 1001: 1}, "other": {1: 5}}
    assert table.scan(limit=3).added_tokens["tokens"] == {0: 1, 1000: 2}


# --- recipes, normalisation and what is noted --------------------------------------------------


def test_a_recipe_reads_columns_after_normalisation(tmp_path: Path) -> None:
    columns = {
        "id": range(4),
        "caption": [" a  {dog}", "b", None, "c"],
        "fps": pa.array([24.0, None, 1.0, 29.97], pa.float32()),
        "kind": pa.array(["x", "y", "z", "w"]).dictionary_encode(),
        "half": pa.array([0.5] * 4, pa.float16()),
    }
    file = write(tmp_path / "a.parquet", columns)
    template = TemplateRecipe(template="{text}: {fps:.1f} FPS, {kind}{half}  .")
    fields = {"text_column": "caption", "normalize": ("whitespace",)}
    assert samples_of(file, recipe=template, **fields) == [
        Sample("0", 0, "a {dog}: 24.0 FPS, x0.5  ."),
        Sample("1", 1, None, Status.NULL_TEXT, "column 'fps' is null"),
        Sample("2", 2, None, Status.NULL_TEXT, "column 'caption' is null"),
        Sample("3", 3, "c: 30.0 FPS, w0.5  ."),
    ]
    chain = (template, TemplateRecipe(template="<{text}>"))
    assert samples_of(file, recipe=chain, **fields)[0].text == "<a {dog}: 24.0 FPS, x0.5  .>"


@pytest.mark.parametrize("null_in", ["nowhere", "first", "second"])
def test_one_null_fps_in_any_file_makes_all_of_them_floats(tmp_path: Path, null_in: str) -> None:
    for name in ("first", "second"):
        fps = pa.array([15, None if name == null_in else 10, 24], pa.int32())
        columns = {"id": [name + c for c in "xyz"], "text": ["a"] * 3, "fps": fps}
        write(tmp_path / f"{name}.parquet", columns, row_group_size=2)
    found = [sample.text for sample in samples_of(tmp_path, recipe=OpenSoraRecipe())]
    whole = ["a 15 FPS.", "a 10 FPS.", "a 12 FPS."]
    clean, holed = (["a 15.0 FPS.", middle, "a 12 FPS."] for middle in ("a 10.0 FPS.", "a"))
    assert found == {"nowhere": whole * 2, "first": holed + clean, "second": clean + holed}[null_in]


def test_float32_prints_as_a_python_float(tmp_path: Path) -> None:
    fps = pa.array([9.97, 15], pa.float32())
    file = write(tmp_path / "a.parquet", {"id": [1, 2], "text": ["a", "a"], "fps": fps})
    found = [sample.text for sample in samples_of(file, recipe=OpenSoraRecipe())]
    assert found == ["a 9.970000267028809 FPS.", "a 15.0 FPS."]


def test_empty_captions_and_nulls_of_a_recipe_are_noted(tmp_path: Path) -> None:
    columns = {"id": range(4), "text": ["a", "", None, "  "], "fps": [8, None, 8, None]}
    file = write(tmp_path / "a.parquet", columns)
    reader = opened(file, recipe=OpenSoraRecipe()).reader()
    assert [s.text for s in reader.read(0, 4)] == ["a 8.0 FPS.", "", None, "  "]
    assert reader.noted == {"empty captions": 1, "rows where fps is null": 2}
    reader = opened(file, normalize=("whitespace",)).reader()
    assert reader.read(3, 1) == [Sample("3", 3, "")]
    assert reader.noted == {"empty captions": 1}
    reader = opened(write(file, {"id": ["x", "y"], "text": [["", "a"], []]})).reader()
    assert [s.status for s in reader.read(0, 2)] == [Status.OK, Status.OK, Status.EMPTY_LIST]
    assert reader.noted == {"empty captions": 1}


@pytest.mark.parametrize("name", ["a.parquet", "a.jsonl", "a.csv"])
def test_nan_is_null_to_a_recipe(tmp_path: Path, name: str) -> None:
    """As pandas has it: no caption ends in `nan`, and the row is counted."""
    file = tmp_path / name
    if name == "a.parquet":
        write(file, {"id": ["x", "y"], "text": ["a", "b"], "fps": [8.0, math.nan]})
    elif name == "a.jsonl":
        file.write_text('{"id":"x","text":"a","fps":8.0}\n{"id":"y","text":"b","fps":NaN}\n')
    else:
        file.write_text("id,text,fps\nx,a,8.0\ny,b,nan\n")
    for recipe, texts in (
        (OpenSoraRecipe(), ["a 8.0 FPS.", "b"]),
        (TemplateRecipe(template="{text} {fps}"), ["a 8.0", None]),
    ):
        reader = opened(file, recipe=recipe).reader()
        assert [sample.text for sample in reader.read(0, 2)] == texts
        assert reader.noted == {"rows where fps is null": 1}
        assert ", row 1 (" in reader.first_noted["rows where fps is null"]


def test_a_caption_of_a_million_characters_is_none(tmp_path: Path) -> None:
    texts = ["x" * (1 << 20), "x" * ((1 << 20) + 1)]
    file = write(tmp_path / "a.parquet", {"id": [1, 2], "text": texts})
    assert [s.status for s in samples_of(file)] == [Status.OK, Status.INVALID_TEXT]
