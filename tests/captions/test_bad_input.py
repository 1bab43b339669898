"""Bad captions: one line that names the file, the row, the column and what to do."""

from __future__ import annotations

import os
import types
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
from caption_case import opened, samples_of, utf8, write
from jobs import call, expect, run_code, write_captions, write_job

from embed_precompute.captions.recipes import OpenSoraRecipe, TemplateRecipe
from embed_precompute.errors import EXIT_USAGE, InputError
from embed_precompute.samples import Sample, Status

GOOD = {"id": ["a", "b", "c"], "text": ["x", "y", "z"]}


def refused(path: Path | str, *parts: str, **fields: Any) -> str:
    """The message of opening, scanning and reading `path`: one line that holds all `parts`."""

    def use() -> None:
        table = opened(path, **fields)
        table.scan()
        table.reader().read(0, table.num_rows)

    with pytest.raises(InputError) as caught:
        use()
    message = str(caught.value)
    assert caught.value.exit_code == EXIT_USAGE
    assert "\n" not in message
    for part in parts:
        assert part in message, message
    return message


# --- files -------------------------------------------------------------------------------------


def test_missing_path(tmp_path: Path) -> None:
    path = str(tmp_path / "no.parquet")
    refused(path, path, "does not exist", "Check the path")
    refused(f"file://{path}", path, "does not exist")
    refused("file://host/x", "expected file:///absolute/path")
    for uri in ("carrier-pigeon://loft/x", "hf://datasets/no/such", "hf://x"):
        refused(uri, uri, "cannot be listed", "s3://", "copy the files to a folder")


def test_any_error_of_a_remote_file_system_is_one_of_the_input(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """hf:// raises what its HTTP client raises."""

    class Flaky:
        def __init__(self, answers: int) -> None:
            self.answers = answers

        def __getattr__(self, name: str) -> Any:
            if self.answers == 0:
                raise RuntimeError("connection\nreset")
            self.answers -= 1
            return getattr(pyarrow.fs.LocalFileSystem(), name)

    write(tmp_path / "a.parquet", GOOD)
    for answers, part in enumerate(["cannot be listed", "cannot be listed", "cannot be read"]):
        fake = types.SimpleNamespace(from_uri=lambda uri, n=answers: (Flaky(n), str(tmp_path)))
        monkeypatch.setattr(pyarrow.fs, "FileSystem", fake)
        refused("s3://bucket/x", part, "connection reset")


def test_a_folder_without_rows(tmp_path: Path) -> None:
    refused(tmp_path, str(tmp_path), "holds no caption table (0 other files were ignored)")
    (tmp_path / "_SUCCESS").touch()
    (tmp_path / "notes.txt").touch()
    refused(tmp_path, "(2 other files were ignored)", "Point captions.path at the folder")
    refused(tmp_path / "*.parquet", "holds no caption table")
    none = {"id": pa.array([], pa.string()), "text": pa.array([], pa.string())}
    for name in "ab":
        write(tmp_path / f"{name}.parquet", none)
    refused(tmp_path, str(tmp_path), "has no rows", "2 file(s)")


def test_files_that_are_no_whole_parquet_file(tmp_path: Path) -> None:
    raw = write(tmp_path / "a.parquet", GOOD).read_bytes()
    footer = int.from_bytes(raw[-8:-4], "little")
    cut = ("is a truncated parquet file", "Copy or write it again")
    cases = [
        *((raw[: 4 + int(part * (len(raw) - 4))], cut) for part in (0.0, 0.3, 0.9, 0.999)),
        (b"id,text\na,hello there\n", ("is not a parquet file", "b'id,t'", "Convert it")),
        (b"", ("is not a parquet file (0 bytes",)),
        (raw[:-8] + (10**6).to_bytes(4, "little") + b"PAR1", ("footer", "claims 1000000 bytes")),
        (raw[: -8 - footer] + b"\xff" * footer + raw[-8:], ("damaged parquet footer",)),
    ]
    for name in ("d.parquet", "c.parquet"):  # of several bad files the first is named
        (tmp_path / name).write_bytes(b"no")
    for payload, parts in cases:
        (tmp_path / "b.parquet").write_bytes(payload)
        refused(tmp_path, str(tmp_path / "b.parquet"), *parts)


def test_links_and_permissions(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", GOOD)
    (tmp_path / "notes.txt").symlink_to(tmp_path / "gone")
    assert len(samples_of(tmp_path)) == 3
    (tmp_path / "b.parquet").symlink_to(tmp_path / "gone")
    refused(tmp_path, str(tmp_path / "b.parquet"), "does not exist", "remove the link")
    file.chmod(0)
    if os.access(file, os.R_OK):
        pytest.skip("this user reads everything")
    refused(file, str(file), "cannot be read")
    tmp_path.chmod(0o300)
    refused(tmp_path, "cannot list a folder")
    tmp_path.chmod(0o700)


# --- columns -----------------------------------------------------------------------------------

FPS, MOTION = OpenSoraRecipe(), OpenSoraRecipe(fps_column=None, motion_column="score")
TAGGED = TemplateRecipe(template="{text} {tags}")
ID, TEXT = "column 'id' (captions.id_column)", "column 'text' (captions.text_column)"
IN_TEMPLATE, INTEGERS = "(captions.recipe.template)", {"integer_columns": ("n",)}


@pytest.mark.parametrize(
    ("columns", "fields", "parts"),
    [
        ({"Texts": ["x"]}, {}, ("no column 'text' (captions.text_column)", "mean 'Texts'?")),
        ({"Texts": ["x"]}, {}, ("Its columns: id, Texts", "Set captions.text_column")),
        ({"text": ["x"]}, {"id_column": "key"}, ("no column 'key'", "Null uses row numbers")),
        (GOOD, {"recipe": FPS}, ("'fps' (captions.recipe.fps_column)", "FPS part out")),
        (GOOD, {"recipe": MOTION}, ("no column 'score' (captions.recipe.motion_column)",)),
        (GOOD, {"recipe": TAGGED}, (f"no column 'tags' {IN_TEMPLATE}",)),
        (GOOD, {"recipe": (MOTION, TAGGED)}, ("'score' (captions.recipe[0].motion_column)",)),
        (GOOD, INTEGERS, ("no column 'n'", "added_tokens")),
        ({"text": [1]}, {}, (TEXT, "int64", "Convert the column")),
        ({"text": [b"x"]}, {}, (TEXT, "binary")),
        ({"text": [None]}, {}, (TEXT, "null")),
        ({"text": [[1]]}, {}, (TEXT, "list<element: int64>")),
        ({"text": [{"a": "x"}]}, {}, (TEXT, "struct<a: string>")),
        ({"text": [[["x"]]]}, {}, (TEXT, "list<element: list<element: string>>")),
        ({"id": [1.0], "text": ["x"]}, {}, (ID, "double", "expected string or integer")),
        ({"id": [b"a"], "text": ["x"]}, {}, (ID, "binary")),
        ({"id": [["a"]], "text": ["x"]}, {}, (ID, "list<element: string>")),
        ({**GOOD, "score": ["1"] * 3}, {"recipe": MOTION}, ("string", "integer or float")),
        ({**GOOD, "tags": [["t"]] * 3}, {"recipe": TAGGED}, (f"'tags' {IN_TEMPLATE}", "list<")),
        ({**GOOD, "n": ["1"] * 3}, INTEGERS, ("'n'", "added_tokens", "expected integer")),
        ({**GOOD, "n": [1, None, 3]}, INTEGERS, ("a.parquet, row 1 ", "column 'n'", "is null")),
        ({**GOOD, "n": [1, 2, -3]}, INTEGERS, ("a.parquet, row 2 ", "column 'n'", "below 0")),
    ],
)
def test_columns_that_cannot_be_used(
    tmp_path: Path, columns: dict[str, Any], fields: dict[str, Any], parts: tuple[str, ...]
) -> None:
    file = write(tmp_path / "a.parquet", {"id": ["a"] * len(columns.get("text", "x")), **columns})
    refused(file, str(file), *parts, **fields)


def test_column_that_occurs_twice(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"])] * 3, ["id", "text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    refused(tmp_path, "2 columns named 'text'", "Rename")


def test_files_that_disagree(tmp_path: Path) -> None:
    """Where it does not matter they may."""
    write(tmp_path / "a.parquet", {**GOOD, "extra": [1, 2, 3]})
    others: list[tuple[dict[str, Any], list[str]]] = [
        ({"id": ["d"], "text": [["x"]]}, ["column 'text'", "list of string", "schemas disagree"]),
        ({"id": [4], "text": ["x"]}, ["column 'id'", "is integer", "string in", "Convert one"]),
        ({"id": ["d"], "txt": ["x"]}, ["b.parquet has no column 'text'", "Did you mean 'txt'?"]),
        ({"id": ["d"], "text": [1]}, ["column 'text'", "int64", "expected string"]),
    ]
    for other, parts in others:
        refused(tmp_path, str(write(tmp_path / "b.parquet", other)), *parts)
    text = pa.array(["w"], pa.large_string()).dictionary_encode()
    write(tmp_path / "b.parquet", {"extra": ["p"], "text": text, "id": ["d"]})
    assert [sample.text for sample in samples_of(tmp_path)] == ["x", "y", "z", "w"]


# --- ids ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["string", "integer", "dictionary"])
def test_duplicate_ids_within_and_across_files(tmp_path: Path, kind: str) -> None:
    def ids(numbers: list[int]) -> Any:
        array = pa.array(numbers if kind == "integer" else [str(n) for n in numbers])
        return array.dictionary_encode() if kind == "dictionary" else array

    first = write(tmp_path / "a.parquet", {"id": ids([1, 2, 3]), "text": ["x"] * 3})
    second = write(tmp_path / "b.parquet", {"id": ids([4, 5, 2, 1]), "text": ["x"] * 4})
    refused(
        tmp_path,
        f"{second}, row 2 (rows count from 0): column 'id' repeats id '2' of {first}, row 1",
        "2 rows in all repeat an id",
        "captions.id_column",
    )
    write(second, {"id": ids([7] * 50_000), "text": ["x"] * 50_000})
    refused(second, f"{second}, row 1", f"id '7' of {second}, row 0", "49999 rows in all")


def test_rows_without_an_id(tmp_path: Path) -> None:
    for ids, what in (
        (pa.array(["a", "b", None, "d"]), "column 'id' is null"),
        (pa.array([1, 2, None, 4]), "column 'id' is null"),
        (utf8([b"a", b"b", b"\xffc", b"d"]), "column 'id' is not UTF-8 at byte 0"),
    ):
        file = write(tmp_path / "a.parquet", {"id": ids, "text": ["x"] * 4}, row_group_size=2)
        refused(file, f"{file}, row 2", what, "captions.id_column")
        with pytest.raises(InputError, match=rf"a\.parquet, row 2 .*{what}"):
            opened(file).reader().read(2, 2)


# --- text --------------------------------------------------------------------------------------

NUMBERED = TemplateRecipe(template="{text} {n}")
BYTES = [b"good", b"ab\xff\xfe", None, b"", b"cut \xe2\x98", b"\xed\xa0\x80", "é".encode()]
OK, NULL, INVALID = Status.OK, Status.NULL_TEXT, Status.INVALID_TEXT


@pytest.mark.parametrize("kind", ["plain", "dictionary", "recipe"])
def test_bad_text_has_a_status_and_hurts_no_other_row(tmp_path: Path, kind: str) -> None:
    array: Any = utf8(BYTES)
    if kind == "dictionary":
        values = utf8([value for value in BYTES if value is not None])
        array = pa.DictionaryArray.from_arrays(pa.array([0, 1, None, 2, 3, 4, 5]), values)
    file = write(tmp_path / "a.parquet", {"id": range(7), "text": array})
    tail = "!" if kind == "recipe" else ""
    samples = samples_of(file, recipe=TemplateRecipe(template="{text}" + tail))
    assert [s.status for s in samples] == [OK, INVALID, NULL, OK, INVALID, INVALID, OK]
    assert [s.text for s in samples if s.text is not None] == ["good" + tail, tail, "é" + tail]
    assert samples[1].error == "column 'text' is not UTF-8 at byte 2 (invalid start byte)"
    assert samples[2].error == "column 'text' is null"


def test_bad_text_in_a_list_and_in_a_recipe_column(tmp_path: Path) -> None:
    entries = utf8([b"a", b"\xff", None, b"b"])
    array = pa.ListArray.from_arrays(pa.array([0, 3, 3, 4], pa.int32()), entries)
    places = utf8([b"by", None, b"\xff"])
    file = write(tmp_path / "a.parquet", {**GOOD, "text": array, "place": places})
    expected = [("a#0", OK), ("a#1", INVALID), ("a#2", NULL), ("b#0", Status.EMPTY_LIST)]
    found = [(s.sample_id, s.status) for s in samples_of(file)]
    assert found == [*expected, ("c#0", OK)]
    samples = samples_of(file, recipe=TemplateRecipe(template="{text} {place} sea"))
    assert samples[0] == Sample("a#0", 0, "a by sea")
    error = "column 'place' is not UTF-8 at byte 0 (invalid start byte)"
    assert samples[4] == Sample("c#0", 2, None, INVALID, error)


def test_on_bad_text_fail(tmp_path: Path) -> None:
    cases: list[tuple[Any, int, str, dict[str, Any]]] = [
        (pa.array(["x", "y", None]), 2, "column 'text' is null", {}),
        (utf8([b"x", b"\xff", b"z"]), 1, "column 'text' is not UTF-8", {}),
        (pa.array([["x"], ["y"], []]), 2, "column 'text' is an empty list", {}),
        (pa.array([["x"], ["y", None], ["z"]]), 1, "entry 1 of column 'text' is null", {}),
        (pa.array([["x"], None, ["z"]]), 1, "column 'text' is null (sample", {}),
        (pa.array(["x", "", "z"]), 1, "column 'text' is empty", {}),
        (pa.array([["x"], ["y"], ["z", ""]]), 2, "column 'text' is empty", {}),
        (pa.array(["x", "y", " "]), 2, "column 'text' is empty", {"normalize": ("whitespace",)}),
        (pa.array(["x", "y", "z"]), 1, "column 'n' is null", {"recipe": NUMBERED}),
    ]
    for array, row, what, fields in cases:
        write(tmp_path / "a.parquet", {"id": ["p"], "text": array.slice(0, 1), "n": [0]})
        file = write(tmp_path / "b.parquet", {**GOOD, "text": array, "n": [1, None, 3]})
        remedy = "captions.on_bad_text to record"
        refused(tmp_path, f"{file}, row {row}", what, remedy, on_bad_text="fail", **fields)


# --- damage ------------------------------------------------------------------------------------


@pytest.mark.parametrize(("column", "checksums"), [("text", False), ("text", True), ("id", False)])
def test_page_damage_is_found_when_it_is_reached(
    tmp_path: Path, column: str, checksums: bool
) -> None:
    columns = {"id": range(400), "text": [f"caption {i}" for i in range(400)]}
    options = {"write_page_checksum": checksums, "use_dictionary": False, "row_group_size": 100}
    file = write(tmp_path / "a.parquet", columns, **options)
    chunk = pq.ParquetFile(file).metadata.row_group(2).column(list(columns).index(column))
    raw = bytearray(file.read_bytes())
    # With page checksums a single letter is enough; without, Arrow sees broken structure only.
    start = chunk.data_page_offset + (chunk.total_compressed_size // 2 if checksums else 0)
    raw[start : start + 4] = b"\x5a" * 4
    file.write_bytes(raw)
    damage = ["a.parquet: row group 2 (rows 200 to 299) is damaged", "Copy or write the file again"]
    refused(file, *damage, repr(column))
    if column == "text":
        assert opened(file).scan().num_rows == 400  # the ids are whole
    reader = opened(file).reader()
    assert len(reader.read(0, 200)) == 200  # and so is what lies before the damage
    with pytest.raises(InputError, match="is damaged"):
        reader.read(200, 50)
    assert len(reader.read(300, 100)) == 100


def test_flipped_bits_never_end_the_process(tmp_path: Path) -> None:
    """A sound reading or an InputError; a process of its own, for a crash has no exception."""
    fps = pa.array([24 if i % 7 else None for i in range(200)], pa.int64())
    columns = {"id": [f"s{i}" for i in range(200)], "text": ["x", "yy"] * 100, "fps": fps}
    options: dict[str, Any] = {"compression": "zstd", "write_page_checksum": True}
    file = write(tmp_path / "a.parquet", columns, row_group_size=80, **options)
    same, refusals, other = map(int, run_code(FLIPS, file).split())
    assert other == 0
    assert min(same, refusals) > 40


FLIPS = """
import sys
from pathlib import Path
from embed_precompute.captions.recipes import CaptionsConfig, OpenSoraRecipe
from embed_precompute.captions.table import CaptionTable
from embed_precompute.errors import InputError

path = Path(sys.argv[1])

def read():
    table = CaptionTable.open(CaptionsConfig(str(path), recipe=OpenSoraRecipe()))
    return table.scan(), table.reader().read(0, table.num_rows)

sound, whole = path.read_bytes(), read()
same = refused = other = 0
for bit in range(0, len(sound) * 8, 101):
    flipped = bytearray(sound)
    flipped[bit // 8] ^= 1 << bit % 8
    path.write_bytes(flipped)
    try:
        if read() == whole: same += 1
        else: other += 1
    except InputError:
        refused += 1
print(same, refused, other)
"""


def test_a_job_refuses_an_output_inside_its_captions(tmp_path: Path, tiny_clip: Path) -> None:
    """Before anything is written: its own files would be captions of the next run."""
    captions = write_captions(tmp_path / "a.parquet", ["x", "y"]).parent
    job = write_job(tmp_path, captions, None, tiny_clip)
    code, _, said = call("plan", str(job), "--write")
    assert (code, not (tmp_path / "out").exists()) == (EXIT_USAGE, True)
    assert "lies inside captions.path" in said


def test_the_plan_counts_what_may_surprise(tmp_path: Path, tiny_clip: Path) -> None:
    columns = {"id": range(4), "text": ["a", "", "", "b"], "fps": [8, None, 8, None]}
    job = write_job(tmp_path, write(tmp_path / "a.parquet", columns), None, tiny_clip)
    code, said, _ = call("plan", str(job), "--captions.recipe.kind", "opensora")
    assert code == 0
    assert "ok 4; 0 repeat an earlier text\n" in said
    place = f"such as {tmp_path / 'a.parquet'}, row 1 "
    assert f"empty captions: 2, {place}(rows count from 0), sample '1'" in said
    assert f"rows where fps is null: 2, {place}" in said
    words = ("--captions.recipe.kind", "opensora", "--output.samples_per_shard", "1")
    code, summary, log = call("run", str(job), *words)
    assert code == 0
    assert "\n  empty captions: 2\n  rows where fps is null: 2\n" in summary
    assert f"{tmp_path / 'a.parquet'}, row " in log
    assert log.count("the first of the empty captions that this rank reads") == 1
    assert "\nnoted        empty captions: 2\n" in expect(0, "info", tmp_path / "out")


@pytest.mark.parametrize(("ending", "what"), [("csv", "empty"), ("parquet", "null")])
def test_a_caption_that_is_missing_is_named(
    tmp_path: Path, tiny_clip: Path, ending: str, what: str
) -> None:
    """CSV has no null: the field was empty."""
    file = tmp_path / f"a.{ending}"
    if ending == "csv":
        file.write_text('id,text\na,x\nb,""\nc,\n')
    else:
        write(file, {"id": ["a", "b", "c"], "text": ["x", None, None]})
    job = write_job(tmp_path, file, None, tiny_clip)
    place = f"{file}, row 1 (rows count from 0), sample 'b': column 'text' is {what}"
    assert f"null_text: 2, such as {place}\n" in expect(0, "plan", job)
    log = expect(0, "run", job)
    assert log.count(f"{place}: the first of the null_text that this rank reads") == 1
    assert f"status: null_text (column 'text' is {what})" in expect(
        *(0, "info", tmp_path / "out", "--id", "c")
    )
