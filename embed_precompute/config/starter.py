"""A configuration file of one's own: a preset's text, comments and all, for a caption table.

Guarantees: nothing but the caption table's keys and output.path differs from the preset. The text
column is one of a known name, or the only one with text; else it is an error.
Costs: parquet's footer, or the first rows of another format, of the table's first file.
"""

from __future__ import annotations

import os
import re
import shlex
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from embed_precompute import __version__
from embed_precompute.captions.files import columns_of, find_files, refuse_output_inside
from embed_precompute.captions.reader import column_type
from embed_precompute.captions.recipes import FLOAT, INTEGER, STRING, STRINGS
from embed_precompute.captions.table import AUTO_IDS
from embed_precompute.config.files import load_config, preset_path
from embed_precompute.encoders.checkpoint import find_fetched, origin_of
from embed_precompute.errors import InputError
from embed_precompute.store.commit import publish_bytes

TEXTS = ("text", "caption", "prompt", "description", "captions", "texts", "prompts")
"""Names of columns with captions, the likeliest first; of any case."""
ID_NAME = re.compile(r"(.*_)?(uu|u)?id|key|filename|file_name|.*_path|video|clip", re.IGNORECASE)
CAPTIONS = """captions:
  path: captions.parquet          # parquet, CSV or JSON Lines: a file, a folder, a glob, a URI
  text_column: text               # the caption: string, or list of strings (one sample each)
  id_column: auto                 # a unique id; null: the row number
"""
FLOAT32_FPS = "It is float32: 23.976 gives 23.97599983215332 FPS, in Open-Sora too"
OUTPUT = """
output:
  path: out                       # the dataset, on a file system every rank sees
"""


def write_starter(preset: str, captions: str, output: Path | None = None) -> list[str]:
    """Write the preset's configuration for a table to `output`, by default `<preset>.yaml`.

    Returns what was found, and last the next command. Raises InputError: no such preset or table,
    no column that holds the captions for certain, or the file is there already.
    """
    source = preset_path(preset)
    path = output or Path(f"{preset}.yaml")
    files = find_files(captions)
    arrow_types = columns_of(files[0])
    types = {name: column_type(kind) for name, kind in arrow_types.items()}
    text, sample_id = _text_column(str(files[0]), types), _id_column(types)
    values: dict[str, Any] = {"path": captions, "text_column": text, "id_column": sample_id}
    whole = source.read_text(encoding="utf-8")
    recipe = yaml.safe_load(whole)["captions"].get("recipe", {})
    for key in ("fps_column", "motion_column"):
        if key in recipe:
            values[key] = recipe[key] if types.get(recipe[key]) in (INTEGER, FLOAT) else None
    whole = re.sub(r"^captions: \{.*\}\n", lambda _: CAPTIONS, whole, flags=re.MULTILINE)
    whole = _with_values(whole, "captions", values)
    if not re.search(r"^output:", whole, re.MULTILINE):
        whole += OUTPUT
    whole = _with_values(whole, "output", {"path": _output_path(captions)})
    listed = ", ".join(f"{name} ({kind})" for name, kind in types.items())
    head = (
        f"The preset {preset} of embed-precompute {__version__} for {captions}.",
        "Paths are relative to the folder that a command is run in.",
        f"Columns of {files[0].path}: {listed}",
    )
    comments = "".join(f"# {' '.join(line.split())}\n" for line in head)
    content = f"{comments}#\n{whole}".encode()
    if os.path.lexists(path) or not publish_bytes(path, content):
        raise InputError(
            f"{path} is there already, and nothing was written. Give another name with --output "
            "FILE, or move it away."
        )
    found = [f"captions: column {text}{', several in a row' * (types[text] == STRINGS)}"]
    texts = [name for name, kind in types.items() if kind in (STRING, STRINGS)]
    if others := [name for name in texts if name not in (text, sample_id)]:
        found[0] += f"; other text, not taken: {', '.join(others)}"
    found.append(f"ids: {'row numbers' if sample_id is None else f'column {sample_id}'}")
    for key in recipe.keys() & values.keys():
        missing = f"null, for there is no column {recipe[key]} of numbers"
        line = f"recipe: {key} {values[key] or missing}"
        if key == "fps_column" and str(arrow_types.get(values[key])) == "float":
            line += f". {FLOAT32_FPS}"
        found.append(line)
    return [f"{path}: written", *(f"  {line}" for line in sorted(found)), *_next(path)]


def _text_column(where: str, types: dict[str, str]) -> str:
    """The column with the captions. Raises InputError: several may be meant, or none."""
    if len(types) == 1 and (found := re.search(r"[;\t|]", next(iter(types)))):
        raise InputError(
            f"{where}: its columns seem to be separated by {found[0]!r}. Write it with commas."
        )
    texts = [name for name, kind in types.items() if kind in (STRING, STRINGS)]
    named = [name for wanted in TEXTS for name in texts if name.lower() == wanted]
    others = [name for name in texts if name not in AUTO_IDS and not ID_NAME.fullmatch(name)]
    if not named and len(others) != 1:
        possible = f"{', '.join(others[:20])} may be it" if others else "no other holds text"
        raise InputError(
            f"{where}: no text column is named {', '.join(TEXTS[:4])}, and {possible}. Rename the "
            "column with the captions to text, or write what `embed-precompute presets NAME` "
            "prints to a file and name the column in captions.text_column."
        )
    return (named or others)[0]


def _id_column(types: dict[str, str]) -> str | None:
    """A column that is named as ids are; None: row numbers."""
    possible = [name for name, kind in types.items() if kind in (STRING, INTEGER)]
    known = [name for name in AUTO_IDS if name in possible]
    return next(iter([*known, *filter(ID_NAME.fullmatch, possible)]), None)


def _output_path(captions: str) -> str:
    """`out`, or where that lies inside the captions a folder beside them."""
    try:
        refuse_output_inside(captions, "out")
    except InputError:
        folder = os.path.abspath(os.path.expanduser(captions))
        return f"{folder}-embeddings"
    return "out"


def _with_values(whole: str, section: str, values: dict[str, Any]) -> str:
    """YAML text with other values of keys of a top-level section; their comments stand
    where most of the section's do."""

    def section_of(block: re.Match[str]) -> str:
        pattern = re.compile(r"^( +)(\w+): \S+ *(#.*)?$", re.MULTILINE)
        places = Counter(m.start(3) - m.start() for m in pattern.finditer(block[0]) if m[3])
        place = max(places, key=places.__getitem__, default=0)

        def changed(line: re.Match[str]) -> str:
            start, key, comment = line.groups()
            if key not in values:
                return line[0]
            value = yaml.safe_dump(values[key], width=10**9, allow_unicode=True)
            value = value.removesuffix("...\n").strip()
            return f"{f'{start}{key}: {value}':<{max(place - 2, 0)}}  {comment or ''}".rstrip()

        return pattern.sub(changed, block[0])

    return re.sub(rf"^{section}:\n(?:(?: .*)?\n)*", section_of, whole, flags=re.MULTILINE)


def _next(path: Path) -> list[str]:
    """What to type now: first `fetch`, where a checkpoint is neither a folder nor fetched."""
    is_here = all(
        Path(each.pretrained).expanduser().is_dir()
        or find_fetched(
            origin_of(
                *(each.pretrained, each.revision, each.kind, each.dtype, each.part, each.tokenizer)
            )
        )
        for each in load_config(path).encoders.values()
    )
    plan, fetch = (
        f"embed-precompute {word} {shlex.quote(str(path))}" for word in ("plan", "fetch")
    )
    return [f"next: {plan}"] if is_here else [f"next: {fetch}", f"then: {plan}"]
