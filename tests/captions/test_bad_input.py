"""Bad captions: one line that names the file, the row, the column and what to do."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
from jobs import call, clean_environment, write_captions, write_job

from embed_precompute.captions import table as table_module
from embed_precompute.captions.recipes import OpenSoraRecipe, TemplateRecipe
from embed_precompute.captions.settings import CaptionsConfig
from embed_precompute.captions.table import CaptionTable
from embed_precompute.errors import EXIT_USAGE, InputError
from embed_precompute.samples import Sample, Status


def write(path: Path, columns: dict[str, Any], **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path, **options)
    return path


def utf8(values: list[bytes | None], arrow_type: Any = None) -> Any:
    """A string array with these bytes, valid or not."""
    array = pa.array(values, pa.binary())
    return pa.Array.from_buffers(arrow_type or pa.string(), len(array), array.buffers())


GOOD = {"id": ["a", "b", "c"], "text": ["x", "y", "z"]}


def refused(
    path: Path | str, *parts: str, integer_columns: tuple[str, ...] = (), **fields: Any
) -> str:
    """The message of opening, scanning and reading `path`: one line that holds all `parts`."""

    def use() -> None:
        table = CaptionTable.open(CaptionsConfig(str(path), **fields), integer_columns)
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


@pytest.mark.parametrize("uri", ["carrier-pigeon://loft/x", "hf://datasets/no/such", "hf://x"])
def test_a_uri_that_cannot_be_listed(uri: str) -> None:
    refused(uri, uri, "cannot be listed", "s3://", "copy the files to a folder")


def test_any_error_of_a_remote_file_system_is_said(
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
    for answers, said in enumerate(["cannot be listed", "cannot be listed", "cannot be read"]):
        fake = types.SimpleNamespace(from_uri=lambda uri, n=answers: (Flaky(n), str(tmp_path)))
        monkeypatch.setattr(pyarrow.fs, "FileSystem", fake)
        refused("s3://bucket/x", said, "connection reset")


def test_empty_folder_and_folder_without_parquet(tmp_path: Path) -> None:
    refused(tmp_path, str(tmp_path), "holds no parquet file (0 other files were ignored)")
    (tmp_path / "_SUCCESS").touch()
    (tmp_path / "notes.txt").touch()
    refused(tmp_path, "(2 other files were ignored)", "Point captions.path at the folder")
    refused(tmp_path / "*.parquet", "holds no parquet file")


@pytest.mark.parametrize("kept", [0.0, 0.3, 0.9, 0.999])
def test_truncated_parquet(tmp_path: Path, kept: float) -> None:
    raw = write(tmp_path / "a.parquet", GOOD).read_bytes()
    bad = tmp_path / "cut.parquet"
    bad.write_bytes(raw[: 4 + int(kept * (len(raw) - 4))])
    refused(tmp_path, str(bad), "is a truncated parquet file", "Copy or write it again")


def test_not_a_parquet_file(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", GOOD)
    bad = tmp_path / "b.parquet"
    bad.write_text("id,text\na,hello there\n")
    refused(tmp_path, str(bad), "is not a parquet file", "b'id,t'", "Convert it")
    bad.write_bytes(b"")
    refused(bad, str(bad), "is not a parquet file (0 bytes")


def test_damaged_footer(tmp_path: Path) -> None:
    bad = write(tmp_path / "a.parquet", GOOD)
    raw = bad.read_bytes()
    bad.write_bytes(raw[:-8] + (10**6).to_bytes(4, "little") + b"PAR1")
    refused(bad, str(bad), "damaged parquet footer", "claims 1000000 bytes")
    length = int.from_bytes(raw[-8:-4], "little")
    bad.write_bytes(raw[: -8 - length] + b"\xff" * length + raw[-8:])
    refused(bad, str(bad), "damaged parquet footer")


def test_the_first_of_several_bad_files_is_named(tmp_path: Path) -> None:
    for name in "dcba":
        (tmp_path / f"{name}.parquet").write_bytes(b"no")
    refused(tmp_path, str(tmp_path / "a.parquet"))


def test_dangling_link(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", GOOD)
    (tmp_path / "b.parquet").symlink_to(tmp_path / "gone")
    refused(tmp_path, str(tmp_path / "b.parquet"), "does not exist", "remove the link")


def test_unreadable_file(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", GOOD)
    file.chmod(0)
    if os.access(file, os.R_OK):
        pytest.skip("this user reads everything")
    refused(file, str(file), "cannot be read")


def test_no_rows_at_all(tmp_path: Path) -> None:
    none = {"id": pa.array([], pa.string()), "text": pa.array([], pa.string())}
    write(tmp_path / "a.parquet", none)
    write(tmp_path / "b.parquet", none)
    refused(tmp_path, str(tmp_path), "has no rows", "2 parquet file(s)")


# --- columns -----------------------------------------------------------------------------------


def test_missing_column_names_the_nearest(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", {"id": ["a"], "Texts": ["x"], "other": [1]})
    refused(
        file,
        str(file),
        "has no column 'text' (captions.text_column)",
        "Did you mean 'Texts'?",
        "Its columns: id, Texts, other",
        "Set captions.text_column",
    )
    message = refused(
        file, "no column 'key' (captions.id_column)", text_column="Texts", id_column="key"
    )
    assert "Did you mean" not in message
    assert "Null uses row numbers" in message


def test_missing_recipe_columns(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", GOOD)
    recipe = OpenSoraRecipe()
    refused(file, "no column 'fps' (captions.recipe.fps_column)", "FPS part out", recipe=recipe)
    recipe = OpenSoraRecipe(fps_column=None, motion_column="score")
    refused(file, "no column 'score' (captions.recipe.motion_column)", recipe=recipe)
    recipe = TemplateRecipe(template="{text} {fps}")
    refused(file, "no column 'fps' (captions.recipe.template)", recipe=recipe)
    refused(file, "no column 'tokens'", "added_tokens", integer_columns=("tokens",))


@pytest.mark.parametrize(
    "array",
    [
        pa.array([1, 2, 3]),
        pa.array([b"x", b"y", b"z"]),
        pa.array([None, None, None]),
        pa.array([[1], [2], [3]]),
        pa.array([{"a": "x"}] * 3),
        pa.array([[["x"]], [["y"]], [["z"]]]),
        pa.array([1, 2, 1]).dictionary_encode(),
    ],
    ids=lambda array: str(array.type),
)
def test_wrongly_typed_text(tmp_path: Path, array: Any) -> None:
    file = write(tmp_path / "a.parquet", {"id": ["a", "b", "c"], "text": array})
    stored = str(pq.ParquetFile(file).schema_arrow.field("text").type)
    refused(file, str(file), "column 'text' (captions.text_column)", stored, "Convert the column")


@pytest.mark.parametrize("ids", [[1.0, 2.0, 3.0], [b"a", b"b", b"c"], [["a"], ["b"], ["c"]]])
def test_wrongly_typed_id(tmp_path: Path, ids: list[Any]) -> None:
    file = write(tmp_path / "a.parquet", {**GOOD, "id": ids})
    refused(file, str(file), "column 'id' (captions.id_column)", "expected string or integer")


def test_wrongly_typed_recipe_columns(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", {**GOOD, "fps": ["24"] * 3, "tags": [["t"]] * 3})
    recipe = OpenSoraRecipe()
    refused(file, "'fps' (captions.recipe.fps_column)", "string", "integer or float", recipe=recipe)
    recipe = TemplateRecipe(template="{text} {tags}")
    refused(file, "'tags' (captions.recipe.template)", "list<element: string>", recipe=recipe)
    refused(file, "'fps'", "added_tokens", "expected integer", integer_columns=("fps",))


def test_column_that_occurs_twice(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"])] * 3, ["id", "text", "text"])
    pq.write_table(table, tmp_path / "a.parquet")
    refused(tmp_path, "2 columns named 'text'", "Rename")


@pytest.mark.parametrize(
    ("other", "parts"),
    [
        ({"id": ["d"], "text": [["x"]]}, ["column 'text'", "list of string", "string in"]),
        ({"id": [4], "text": ["x"]}, ["column 'id'", "is integer", "string in"]),
    ],
)
def test_files_that_disagree(tmp_path: Path, other: dict[str, Any], parts: list[str]) -> None:
    first = write(tmp_path / "a.parquet", GOOD)
    second = write(tmp_path / "b.parquet", other)
    refused(tmp_path, str(first), str(second), "schemas disagree", "Convert one", *parts)


def test_a_file_without_the_column_and_one_with_another_type(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", GOOD)
    second = write(tmp_path / "b.parquet", {"id": ["d"], "txt": ["x"]})
    refused(tmp_path, f"{second} has no column 'text'", "Did you mean 'txt'?")
    write(second, {"id": ["d"], "text": [1]})
    refused(tmp_path, str(second), "column 'text'", "int64", "expected string")


def test_files_may_disagree_where_it_does_not_matter(tmp_path: Path) -> None:
    write(tmp_path / "a.parquet", {**GOOD, "extra": [1, 2, 3]})
    text = pa.array(["w"], pa.large_string()).dictionary_encode()
    write(tmp_path / "b.parquet", {"extra": ["p"], "text": text, "id": ["d"]})
    table = CaptionTable.open(CaptionsConfig(str(tmp_path)))
    assert table.scan().num_rows == 4
    assert [sample.text for sample in table.reader().read(0, 4)] == ["x", "y", "z", "w"]


# --- ids ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["string", "integer", "dictionary"])
def test_duplicate_ids_within_and_across_files(tmp_path: Path, kind: str) -> None:
    def ids(numbers: list[int]) -> Any:
        if kind == "integer":
            return pa.array(numbers)
        names = pa.array([f"{n}" for n in numbers])
        return names if kind == "string" else names.dictionary_encode()

    first = write(tmp_path / "a.parquet", {"id": ids([1, 2, 3]), "text": ["x"] * 3})
    second = write(tmp_path / "b.parquet", {"id": ids([4, 5, 2, 1]), "text": ["x"] * 4})
    refused(
        tmp_path,
        f"{second}, row 2 (the first is row 0): column 'id' repeats id '2' of {first}, row 1",
        "2 rows in all repeat an id",
        "captions.id_column",
    )
    write(second, {"id": ids([7, 7]), "text": ["x"] * 2})
    refused(second, f"{second}, row 1", f"repeats id '7' of {second}, row 0")


def test_an_id_column_of_one_value(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", {"id": ["same"] * 50_000, "text": ["x"] * 50_000})
    refused(file, "row 1 ", "row 0 ", "49999 rows in all")


@pytest.mark.parametrize("ids", [["a", "b", None, "d"], [1, 2, None, 4]])
def test_null_ids(tmp_path: Path, ids: list[Any]) -> None:
    file = write(tmp_path / "a.parquet", {"id": ids, "text": ["x"] * 4}, row_group_size=2)
    refused(file, f"{file}, row 2", "column 'id' is null", "Fill it in", "captions.id_column")
    table = CaptionTable.open(CaptionsConfig(str(file)))
    with pytest.raises(InputError, match=r"a\.parquet, row 2 .*column 'id' is null"):
        table.reader().read(2, 2)


def test_ids_that_are_not_utf8(tmp_path: Path) -> None:
    ids = utf8([b"a", b"b", b"\xffc", b"d"])
    file = write(tmp_path / "a.parquet", {"id": ids, "text": ["x"] * 4}, row_group_size=2)
    refused(file, f"{file}, row 2", "column 'id' is not UTF-8 at byte 0", "Repair the id")
    with pytest.raises(InputError, match=r"row 2 .*column 'id' is not UTF-8"):
        CaptionTable.open(CaptionsConfig(str(file))).reader().read(2, 2)


# --- text --------------------------------------------------------------------------------------

BYTES = [b"good", b"ab\xff\xfe", None, b"", b"cut \xe2\x98", b"\xed\xa0\x80", "é".encode()]
STATUSES = [
    Status.OK,
    Status.INVALID_TEXT,
    Status.NULL_TEXT,
    Status.OK,
    Status.INVALID_TEXT,
    Status.INVALID_TEXT,
    Status.OK,
]


@pytest.mark.parametrize("kind", ["plain", "dictionary", "recipe"])
def test_bad_text_has_a_status_and_hurts_no_other_row(tmp_path: Path, kind: str) -> None:
    array: Any = utf8(BYTES)
    if kind == "dictionary":
        values = utf8([value for value in BYTES if value is not None])
        array = pa.DictionaryArray.from_arrays(pa.array([0, 1, None, 2, 3, 4, 5]), values)
    file = write(tmp_path / "a.parquet", {"id": range(7), "text": array})
    recipe = TemplateRecipe(template="{text}!" if kind == "recipe" else "{text}")
    table = CaptionTable.open(CaptionsConfig(str(file), recipe=recipe))
    assert table.scan().num_samples == 7
    samples = table.reader().read(0, 7)
    assert [sample.status for sample in samples] == STATUSES
    tail = "!" if kind == "recipe" else ""
    assert [s.text for s in samples if s.text is not None] == ["good" + tail, tail, "é" + tail]
    assert samples[1].error == "column 'text' is not UTF-8 at byte 2 (invalid start byte)"
    assert samples[2].error == "column 'text' is null"


def test_bad_text_in_a_list(tmp_path: Path) -> None:
    entries = utf8([b"a", b"\xff", None, b"b"])
    array = pa.ListArray.from_arrays(pa.array([0, 3, 3, 4], pa.int32()), entries)
    file = write(tmp_path / "a.parquet", {"id": ["r", "s", "t"], "text": array})
    samples = CaptionTable.open(CaptionsConfig(str(file))).reader().read(0, 3)
    assert [(s.sample_id, s.status) for s in samples] == [
        ("r#0", Status.OK),
        ("r#1", Status.INVALID_TEXT),
        ("r#2", Status.NULL_TEXT),
        ("s#0", Status.EMPTY_LIST),
        ("t#0", Status.OK),
    ]


def test_bad_text_in_a_template_column(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", {**GOOD, "place": utf8([b"\xff", None, b"sea"])})
    recipe = TemplateRecipe(template="{text} at {place}")
    samples = CaptionTable.open(CaptionsConfig(str(file), recipe=recipe)).reader().read(0, 3)
    assert [s.status for s in samples] == [Status.INVALID_TEXT, Status.NULL_TEXT, Status.OK]
    assert samples[0].error == "column 'place' is not UTF-8 at byte 0 (invalid start byte)"
    assert samples[2] == Sample("c", 2, "z at sea")


@pytest.mark.parametrize(
    ("array", "row", "what"),
    [
        (pa.array(["x", "y", None]), 2, "column 'text' is null"),
        (utf8([b"x", b"\xff", b"z"]), 1, "column 'text' is not UTF-8"),
        (pa.array([["x"], ["y"], []]), 2, "column 'text' is an empty list"),
        (pa.array([["x"], ["y", None], ["z"]]), 1, "column 'text' is null"),
    ],
    ids=["null", "utf8", "list", "entry"],
)
def test_on_bad_text_fail(tmp_path: Path, array: Any, row: int, what: str) -> None:
    write(tmp_path / "a.parquet", {"id": ["p"], "text": array.slice(0, 1)})
    file = write(tmp_path / "b.parquet", {"id": ["a", "b", "c"], "text": array})
    refused(
        tmp_path, f"{file}, row {row}", what, "captions.on_bad_text to record", on_bad_text="fail"
    )


def test_on_bad_text_fail_looks_at_recipe_columns_and_empty_captions(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", {**GOOD, "n": [1, None, 3]})
    recipe = TemplateRecipe(template="{text} {n}")
    refused(file, f"{file}, row 1", "column 'n' is null", recipe=recipe, on_bad_text="fail")
    for texts in (["x", "y", ""], [["x"], ["y"], ["z", ""]]):
        file = write(tmp_path / "a.parquet", {**GOOD, "text": texts})
        refused(file, f"{file}, row 2", "column 'text' is empty", on_bad_text="fail")
    file = write(tmp_path / "a.parquet", {**GOOD, "text": ["x", "y", " "]})
    normalized = {"normalize": ("whitespace",), "on_bad_text": "fail"}
    refused(file, f"{file}, row 2", "column 'text' is empty", **normalized)


# --- added tokens ------------------------------------------------------------------------------


def test_bad_added_tokens(tmp_path: Path) -> None:
    file = write(tmp_path / "a.parquet", {**GOOD, "n": [1, None, 3], "m": [1, 2, -3]})
    refused(file, f"{file}, row 1", "column 'n'", "is null", integer_columns=("n",))
    refused(file, f"{file}, row 2", "column 'm'", "below 0", integer_columns=("m",))


def test_a_column_that_cannot_be_added_tokens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(table_module, "MAX_ADDED_TOKENS", 2)
    file = write(tmp_path / "a.parquet", {**GOOD, "n": [1, 2, 3]})
    refused(file, "column 'n'", "more than 2 different values", integer_columns=("n",))


# --- pages -------------------------------------------------------------------------------------


@pytest.mark.parametrize("checksums", [False, True])
def test_page_damage_is_found_when_it_is_reached(tmp_path: Path, checksums: bool) -> None:
    columns = {"id": range(400), "text": [f"caption {i}" for i in range(400)]}
    file = write(
        tmp_path / "a.parquet",
        columns,
        row_group_size=100,
        write_page_checksum=checksums,
        use_dictionary=False,
    )
    chunk = pq.ParquetFile(file).metadata.row_group(2).column(1)
    raw = bytearray(file.read_bytes())
    # With page checksums a single letter is enough; without, Arrow sees broken structure only.
    start = chunk.data_page_offset + (chunk.total_compressed_size // 2 if checksums else 0)
    raw[start : start + 4] = b"\x5a" * 4
    file.write_bytes(raw)
    table = CaptionTable.open(CaptionsConfig(str(file)))
    assert table.scan().num_rows == 400  # the ids are whole
    reader = table.reader()
    assert len(reader.read(0, 200)) == 200  # and so is what lies before
    with pytest.raises(InputError) as caught:
        reader.read(200, 50)
    message = str(caught.value)
    assert re.search(r"a\.parquet: row group 2 \(rows 200 to 299\) is damaged", message)
    assert "'text'" in message
    assert "Copy or write the file again" in message
    assert "\n" not in message
    assert len(table.reader().read(300, 100)) == 100


def test_page_damage_in_the_ids_stops_the_scan(tmp_path: Path) -> None:
    columns = {"id": [f"id {i}" for i in range(300)], "text": ["x"] * 300}
    file = write(tmp_path / "a.parquet", columns, row_group_size=100)
    chunk = pq.ParquetFile(file).metadata.row_group(1).column(0)
    raw = bytearray(file.read_bytes())
    raw[chunk.data_page_offset : chunk.data_page_offset + 8] = b"\x5a" * 8
    file.write_bytes(raw)
    refused(file, str(file), "row group 1 (rows 100 to 199) is damaged", "'id'")


def test_flipped_bits_never_end_the_process(tmp_path: Path) -> None:
    """A sound reading or an InputError; a process of its own, for a crash has no exception."""
    fps = pa.array([24 if i % 7 else None for i in range(200)], pa.int64())
    columns = {"id": [f"s{i}" for i in range(200)], "text": ["x", "yy"] * 100, "fps": fps}
    options: dict[str, Any] = {"compression": "zstd", "write_page_checksum": True}
    file = write(tmp_path / "a.parquet", columns, row_group_size=80, **options)
    done = subprocess.run(
        [sys.executable, "-c", FLIPS, str(file)],
        env=clean_environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    counts = dict(zip(("same", "refused", "other"), map(int, done.stdout.split()), strict=True))
    assert counts["other"] == 0, counts
    assert min(counts["same"], counts["refused"]) > 100, counts


FLIPS = """
import sys
from pathlib import Path
from embed_precompute.captions.recipes import OpenSoraRecipe
from embed_precompute.captions.settings import CaptionsConfig
from embed_precompute.captions.table import CaptionTable
from embed_precompute.errors import InputError

path = Path(sys.argv[1])

def read():
    table = CaptionTable.open(CaptionsConfig(str(path), recipe=OpenSoraRecipe()))
    return table.scan(), table.reader().read(0, table.num_rows)

sound, whole = path.read_bytes(), read()
same = refused = other = 0
for bit in range(0, len(sound) * 8, 41):
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
