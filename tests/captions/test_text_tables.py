"""CSV, TSV and JSON Lines: the same samples as from parquet, with the types pandas would find."""

from __future__ import annotations

import hashlib
import io
import json
import math
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
import xxhash
from caption_case import opened, samples_of, write
from handmade import open_below
from jobs import expect, write_job

from embed_precompute.captions import text_tables
from embed_precompute.captions.recipes import OpenSoraRecipe, TemplateRecipe
from embed_precompute.errors import ConflictError, InputError
from embed_precompute.samples import Sample, Status

OK, NULL, INVALID = Status.OK, Status.NULL_TEXT, Status.INVALID_TEXT
FPS = OpenSoraRecipe(fps_max=24)


def put(path: Path, content: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def lines_of(*rows: Any) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


# --- CSV ---------------------------------------------------------------------------------------

HARD = (
    '\ufeff"path",text,fps\r\n'
    'a.mp4,"a dog, a ""cat""\nand a\r\nbird",24\r\n'
    "\r\n"
    "007,naïve ☕ 犬,25\r\n"
    'c.mp4,,""\r\n'
    "d.mp4,None,30"
)
HARD_SAMPLES = [
    Sample("a.mp4", 0, 'a dog, a "cat"\nand a\r\nbird 24 FPS.'),
    Sample("007", 1, "naïve ☕ 犬 12 FPS."),
    Sample("c.mp4", 2, None, NULL, "column 'text' is empty"),
    Sample("d.mp4", 3, "None 15 FPS."),
]


@pytest.mark.parametrize("group_bytes", [1, 30, 1 << 20])
@pytest.mark.parametrize(("name", "old", "new"), [("a.csv", ",", ","), ("a.TSV", ",", "\t")])
def test_quotes_line_breaks_and_empty_fields(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group_bytes: int, name: str, old: str, new: str
) -> None:
    monkeypatch.setattr(text_tables, "GROUP_BYTES", group_bytes)
    text = HARD.replace("a dog, a", "A DOG").replace(old, new).replace("A DOG", "a dog, a")
    file = put(tmp_path / name, text)
    table = opened(file, recipe=FPS)
    assert table.config.id_column == "path"
    assert table.scan().num_rows == 4
    reader = table.reader()
    assert reader.read(0, 4) == HARD_SAMPLES
    assert [reader.read(row, 1) for row in (3, 1, 2, 0)] == [
        [HARD_SAMPLES[row]] for row in (3, 1, 2, 0)
    ]
    raw = file.read_bytes()
    (found,) = table.files
    assert (found.path, found.bytes, found.rows) == (name, len(raw), 4)
    assert found.content_xxh3 == xxhash.xxh3_128_hexdigest(raw)
    assert found.footer_sha256 == hashlib.sha256(raw).hexdigest()


@pytest.mark.parametrize(
    "fields",
    [
        ["24", "8", "30"],
        ["24", "", "30"],
        ["24", "8", "24.0"],
        ["23.976", "29.97", "59.94005994"],
        ["NaN", "8", "30"],
        ["N/A", "8.0", "null"],
        ["", "", ""],
    ],
    ids=str,
)
def test_a_column_of_numbers_is_what_pandas_makes_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fields: list[str]
) -> None:
    """Open-Sora's text depends on it: `24 FPS` or `24.0 FPS`. A row may be a group of its own."""
    text = "id,text,fps\n" + "".join(f"{i},x,{fps}\n" for i, fps in enumerate(fields))
    seen = pd.read_csv(io.StringIO(text))["fps"].tolist()
    as_is = OpenSoraRecipe(fps_max=24, fps_format="int")  # a float is written as a float anyway
    expected = [as_is.render("x", [None if math.isnan(fps) else fps]) for fps in seen]
    for group_bytes in (1, 1 << 20):
        monkeypatch.setattr(text_tables, "GROUP_BYTES", group_bytes)
        found = samples_of(put(tmp_path / "a.csv", text), recipe=FPS)
        assert [sample.text for sample in found] == expected


def test_several_files_are_one_table(tmp_path: Path) -> None:
    """A column is of one type in all of them, and a name stays a name."""
    put(tmp_path / "a.csv", "id,text,fps,code\n1,x,8,007\n")
    put(tmp_path / "b.csv", "code,fps,text,id\n8,9.5,y,x2\n")
    assert [s.text for s in samples_of(tmp_path, recipe=FPS)] == ["x 8.0 FPS.", "y 9.5 FPS."]
    coded = TemplateRecipe(template="{text} {code}")
    assert [s.text for s in samples_of(tmp_path, recipe=coded)] == ["x 007", "y 8"]
    schema = opened(tmp_path).schema()
    assert dict(zip(schema.names, schema.types, strict=True)) == {
        "id": pa.string(),
        "text": pa.string(),
        "fps": pa.float64(),
        "code": pa.string(),
    }
    write(tmp_path / "c.parquet", {"id": ["p"], "text": ["z"]})
    with pytest.raises(InputError, match=r"two formats, .*a\.csv and .*c\.parquet: expected one"):
        opened(tmp_path)
    assert len(samples_of(tmp_path / "*.csv")) == 2


def test_bad_utf8_is_a_status_as_in_parquet(tmp_path: Path) -> None:
    file = put(tmp_path / "a.csv", b"id,text\na,good\nb,ab\xff\xfe\nc,\xc3\xa9\n")
    found = [(s.status, s.text, s.error) for s in samples_of(file)]
    error = "column 'text' is not UTF-8 at byte 2 (invalid start byte)"
    assert found == [(OK, "good", None), (INVALID, None, error), (OK, "é", None)]
    with pytest.raises(InputError, match=r"a\.csv, row 1 .* is not UTF-8 at byte 2"):
        samples_of(file, on_bad_text="fail")


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("", "a.csv is empty: expected a first line with the names of the columns"),
        ("id,text\na,x\nb\n", "a.csv, line 3 has 1 field(s): expected 2, as in the header"),
        ('id,text\na,"x\ny"\nb,y,z\n', "a.csv, line 4 has 3 field(s): expected 2"),
        ('id,text\na,x\nb,"y\nc,z\n', "a.csv, line 3 is not CSV"),
        ('id,text\na,"x"y\n', "a.csv, line 2 is not CSV"),
        ("id,text,text\na,x,y\n", "a.csv has 2 columns named 'text': expected one"),
        (b"id,t\xff\n", "a.csv: the header is not UTF-8"),
        ("id,text\na,x\n".encode("utf-16"), "a.csv is UTF-16: expected UTF-8"),
        ("video1,a dog\nvideo2,a cat\n", "none of the columns id, sample_id, path"),
        ("id,text\n", "has no rows: 1 file(s), all empty"),
        ("id,text\na,x\n,y\n", "a.csv, row 1 (rows count from 0): column 'id' is null"),
        ("id,text\na,x\na,y\n", "column 'id' repeats id 'a'"),
    ],
)
def test_csv_that_is_refused(tmp_path: Path, content: str | bytes, said: str) -> None:
    file = put(tmp_path / "a.csv", content)
    with pytest.raises(InputError) as caught:
        opened(file).scan()
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_column_that_is_no_number_names_the_first_value(tmp_path: Path) -> None:
    file = put(tmp_path / "a.csv", "id,text,fps\na,x,24\nb,y,\nc,z,24 fps\n")
    with pytest.raises(InputError, match=r"row 2 .* column 'fps' .* holds '24 fps': expected int"):
        opened(file, recipe=FPS)
    assert len(samples_of(file)) == 3  # nobody needs it


def test_a_quote_that_is_never_closed_does_not_take_the_rest(tmp_path: Path) -> None:
    file = put(tmp_path / "a.csv", 'id,text\na,x\nb,"y\n' + ("z" * 999 + "\n") * 5000)
    with pytest.raises(InputError, match=r"a\.csv, line 3 is not CSV \(field larger than field"):
        opened(file)


# --- JSON Lines --------------------------------------------------------------------------------


@pytest.mark.parametrize("group_bytes", [1, 1 << 20])
def test_json_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, group_bytes: int) -> None:
    monkeypatch.setattr(text_tables, "GROUP_BYTES", group_bytes)
    rows = [
        {"sample_id": 7, "text": "a\ndog", "fps": 24, "meta": {"a": [1]}},
        {"sample_id": -3, "text": "é \ud800"},
        {"sample_id": 2**40, "text": None, "fps": 8.0, "late": True},
        {"sample_id": 9, "text": "", "meta": 3},
    ]
    raw = lines_of(*rows).encode().replace(b"}\n{", b"}\r\n\n{", 1)
    file = put(tmp_path / "a.jsonl", raw)
    error = "column 'text' is not UTF-8 at byte 3 (invalid continuation byte)"
    assert samples_of(file, recipe=FPS) == [
        Sample("7", 0, "a\ndog 24 FPS."),
        Sample("-3", 1, None, INVALID, error),
        Sample(str(2**40), 2, None, NULL, "column 'text' is null"),
        Sample("9", 3, ""),
    ]
    table = opened(file)
    schema = table.schema()
    columns = {"sample_id": pa.int64(), "text": pa.string(), "fps": pa.float64()}
    columns |= {"meta": pa.string(), "late": pa.bool_()}
    assert dict(zip(schema.names, schema.types, strict=True)) == columns
    batches = [batch for _, batch in table.rows(schema.names).batches(0, 4)]
    meta = [value for batch in batches for value in batch.column("meta").to_pylist()]
    assert meta == ['{"a": [1]}', None, None, "3"]  # what is of no one type stays JSON


def test_json_lists_and_integers(tmp_path: Path) -> None:
    rows = [{"text": ["a", None]}, {"text": []}, {"text": None}, {"text": ["b"], "fps": 8}]
    file = put(tmp_path / "a.jsonl", lines_of(*({"id": i} | row for i, row in enumerate(rows))))
    found = [(s.sample_id, s.text, s.status) for s in samples_of(file, recipe=FPS)]
    assert found == [
        ("0#0", "a", OK),
        ("0#1", None, NULL),
        ("1#0", None, Status.EMPTY_LIST),
        ("2#0", None, NULL),
        ("3#0", "b 8.0 FPS.", OK),  # with a gap anywhere pandas reads floats
    ]
    put(tmp_path / "a.jsonl", lines_of({"id": "x", "text": "a", "fps": 8}))
    assert samples_of(file, recipe=FPS) == [Sample("x", 0, "a 8 FPS.")]


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"id": 1, "text": "x"}\n{"id": 2,\n', "a.jsonl, line 2 is not JSON"),
        ('{"id": 1, "text": "x"}\n\n[1]\n', "a.jsonl, line 3 holds [1]: expected one JSON object"),
        (lines_of({"id": 1, "text": "x"}, {"id": "b", "text": "y"}), """row 1 (rows count from 0)\
: column 'id' (captions.id_column) holds '"b"': expected string or integer in all rows"""),
        (lines_of({"id": 1, "text": {}}), "column 'text' (captions.text_column) holds '{}'"),
        (lines_of({"id": 1, "text": 5}), "column 'text' (captions.text_column) has type int64"),
        (lines_of({"id": 1.5, "text": "x"}), "column 'id' (captions.id_column) has type double"),
        (lines_of({"id": 1 << 70, "text": "x"}), "column 'id' (captions.id_column) holds '1180"),
        ("", "has no rows"),
    ],
)  # fmt: skip
def test_json_that_is_refused(tmp_path: Path, content: str, said: str) -> None:
    file = put(tmp_path / "a.jsonl", content)
    with pytest.raises(InputError) as caught:
        opened(file).scan()
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


# --- both --------------------------------------------------------------------------------------


def test_rows_are_found_by_groups_and_files_are_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_tables, "GROUP_BYTES", 1000)
    for name in ("a.csv", "b.csv"):
        first = 500 * (name == "b.csv")
        rows = (f"{i},caption {i}\n" for i in range(first, first + 500))
        put(tmp_path / name, "id,text\n" + "".join(rows))
    table = opened(tmp_path)
    groups = len(table.row_map.files[0].group_starts) - 1
    assert 5 < groups < 12
    reader = table.reader()
    for first, count in ((990, 10), (0, 30), (450, 100), (3, 1)):
        found = reader.read(first, count)
        assert [(s.sample_id, s.row) for s in found] == [
            (str(i), i) for i in range(first, first + count)
        ]
        assert open_below(tmp_path)
    reader.close()
    assert open_below(tmp_path) == []
    put(tmp_path / "b.csv", "id,text\n3,x\n")
    table = opened(tmp_path)
    with pytest.raises(InputError, match=r"repeats id '3' of .*a\.csv, row 3"):
        table.scan()


def test_bytes_that_change_after_open_are_a_conflict(tmp_path: Path) -> None:
    file = put(tmp_path / "a.csv", "id,text\na,one\nb,two\n")
    table = opened(file)
    put(file, "id,text\na,two\nb,one\n")
    with pytest.raises(ConflictError, match=r"a\.csv changed since it was opened"):
        table.reader().read(0, 2)
    put(file, "id,text\na,one\nb,two\nc,three\n")
    with pytest.raises(ConflictError, match=r"a\.csv changed since it was planned: 28 bytes now"):
        table.reader().read(0, 2)


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.csv", "id;text\n1;x\n", "Its columns seem to be separated by ';'"),
        ("a.csv", "Path,text\n1,x\n", "Did you mean 'Path'?"),
        ("a.csv", "id,Text\n1,x\n", "Did you mean 'Text'?"),
        ("a.txt", "id,text\n1,x\n", "a.txt has an unknown ending and is not a parquet file"),
    ],
)
def test_nearly_a_table(tmp_path: Path, name: str, content: str, said: str) -> None:
    put(tmp_path / name, content.encode())
    with pytest.raises(InputError) as raised:
        opened(tmp_path / name)
    assert said in str(raised.value)


def test_a_name_says_the_format(tmp_path: Path) -> None:
    put(tmp_path / "a.csv.gz", b"\x1f\x8bxxxxxxxxxxxxxxxx")
    with pytest.raises(InputError, match=r"give it its own ending \(\.csv"):
        opened(tmp_path / "a.csv.gz")
    with pytest.raises(InputError, match="holds no caption table"):
        opened(tmp_path)


def test_the_format_changes_no_byte_of_the_dataset(tmp_path: Path, tiny_clip: Path) -> None:
    """Shards and rows parts are named by their content."""
    texts = [f'scene {i},\n"take" {i % 3}' for i in range(25)]
    table = pd.DataFrame({"id": [f"s{i}" for i in range(25)], "text": texts})
    table.to_csv(tmp_path / "a.csv", index=False)
    table.to_csv(tmp_path / "a.tsv", index=False, sep="\t")
    table.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    table.to_parquet(tmp_path / "a.parquet")
    names = []
    for file in ("a.parquet", "a.csv", "a.tsv", "a.jsonl"):
        folder = tmp_path / file.replace(".", "-")
        folder.mkdir()
        expect(0, "run", write_job(folder, tmp_path / file, None, tiny_clip))
        expect(0, "verify", folder / "out")
        shards = folder / "out" / "shards"
        names.append({path.name for path in shards.glob("*/*") if path.suffix != ".json"})
    assert len(names[0]) == 6
    assert all(each == names[0] for each in names)
