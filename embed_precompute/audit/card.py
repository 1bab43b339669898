"""README.md of a dataset: a card as the Hugging Face hub has it, by manifest.json and the plan.

Guarantees: a function of the dataset and of what config.yaml calls its encoders; no shard is read.
A README.md that a person wrote is left alone. No caption stands in it.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from embed_precompute import __version__
from embed_precompute.audit.info import encoder_words, recipe_words
from embed_precompute.encoders.hub import HUB_ID
from embed_precompute.samples import Status
from embed_precompute.steps import counted
from embed_precompute.store.commit import remove_file, replace_bytes
from embed_precompute.store.index import read_manifest
from embed_precompute.store.manifest import finished_plan

CARD = "README.md"
MARK = "# made by embed-precompute"
"""Begins the second line of a card that is ours, a comment: the hub wants `---` in the first."""
SIZES = {
    **{10**3: "n<1K", 10**4: "1K<n<10K", 10**5: "10K<n<100K", 10**6: "100K<n<1M"},
    **{10**7: "1M<n<10M", 10**8: "10M<n<100M", 10**9: "100M<n<1B"},
}
"""The hub's names of sizes, by the number they are below."""


def write_card(root: Path) -> bool:
    """Writes README.md of a finished dataset; False where there is one that is not ours.

    Raises FileNotFoundError while the dataset is not finalised.
    """
    path = root / CARD
    if os.path.lexists(path) and not _is_ours(path):
        return False
    replace_bytes(path, card_text(root).encode(errors="backslashreplace"))
    return True


def remove_card(root: Path) -> None:
    """Removes the card if it is ours: its dataset is no longer finished."""
    if _is_ours(root / CARD):
        remove_file(root / CARD)


def _is_ours(path: Path) -> bool:
    try:
        with path.open("rb") as file:
            return file.readline(200) == b"---\n" and file.readline(200).startswith(MARK.encode())
    except OSError:  # it is not there, or a folder, or it may not be read
        return False


def configured(root: Path) -> dict[str, Mapping[str, Any]]:
    """What config.yaml says of each encoder; nothing where it says nothing. It is for people, and
    may be another release's."""
    with contextlib.suppress(OSError, ValueError, yaml.YAMLError, LookupError, TypeError):
        encoders = dict(yaml.safe_load((root / "config.yaml").read_bytes())["encoders"])
        return {name: each for name, each in encoders.items() if isinstance(each, dict)}
    return {}


def model_words(given: Mapping[str, Any]) -> list[str]:
    """A hub id as config.yaml has it, and its revision; of a folder the name alone, for where it
    lay says nothing to others. Nothing if it is not named."""
    if not given.get("pretrained"):
        return []
    name = str(given["pretrained"])
    if HUB_ID.fullmatch(name) is None:
        return [f"folder {Path(name).name}"]
    return [name, *([str(given["revision"])] if given.get("revision") else [])]


def percent(part: float, whole: float) -> str:
    """Such as 4.213 %; 100 % is all of it."""
    words = f"{100 * part / whole:.4g}" if whole else "0"
    return "over 99.99 %" if words == "100" and part < whole else f"{words} %"


def card_text(root: Path) -> str:
    """The card of the finished dataset in `root`."""
    manifest, plan, names = read_manifest(root), finished_plan(root), configured(root)
    counts, encoders = manifest.counts, manifest.spec["encoders"]
    ok = counts.status[Status.OK.label]
    types = sorted({str(each.get("model_type", "")).lower() for each in encoders.values()})
    front = {
        "pretty_name": f"Text embeddings by {', '.join(sorted(encoders))}",
        "tags": ["embed-precompute", "text-embeddings"]
        + [each for each in types if re.fullmatch(r"[a-z0-9][a-z0-9_.-]*", each)],
        "task_categories": ["feature-extraction", "text-to-video"],
        "size_categories": [
            next((name for most, name in SIZES.items() if counts.samples < most), "n>1B")
        ],
        # Else the hub shows rows parts and manifest.parquet as one table.
        "configs": [{"config_name": "samples", "data_files": "manifest.parquet"}],
    }
    status = ", ".join(f"{s.label} {n:,}" for s in Status if (n := counts.status[s.label]))
    facts = {
        "samples": f"{counts.samples:,} of {counted(counts.rows, 'input row')} ({status})",
        "stored": f"{counts.stored:,} embeddings by each encoder; equal captions of a shard share "
        "one",
        "captions": f"{counted(len(plan.inputs.files), 'file')}, text column "
        f"{_code(plan.inputs.text_column)}, id column {_code(plan.inputs.id_column)}",
        "recipe": _code(recipe_words(plan.spec.get("captions"))),
    }
    for name, spec in sorted(encoders.items()):
        given = names.get(name, {})
        model = [_code(each) for each in model_words(given)]
        facts[f"encoder {name}"] = " ".join([*model, _code(encoder_words(name, spec, plan))])
        if given.get("reference"):
            facts[f"{name} settings as in"] = _code(given["reference"])
        sums = counts.encoders[name]
        truncated = f"{sums.truncated:,} captions truncated ({percent(sums.truncated, ok)})"
        facts[f"{name} tokens"] = f"{sums.tokens:,}; {truncated}"
    for what, count in sorted(counts.noted.items()):
        facts[_code(what)] = f"{count:,}"
    for made in manifest.environments:
        words = ", ".join(f"{key} {value}" for key, value in sorted(made.environment.items()))
        facts[f"environment of {counted(made.units, 'shard')}"] = _code(words)
    facts["fingerprint"] = _code(manifest.fingerprint)
    facts["plan"] = _code(manifest.plan_id)
    shapes = ", ".join(
        f'"text_{tensor.name}": [{"" if tensor.per_caption else "L, "}{tensor.width}]'
        for tensor in plan.tensors
    )
    return "\n".join(
        [
            "---",
            f"{MARK} {__version__}, which writes it again. Remove this line to keep your changes.",
            yaml.safe_dump(front, sort_keys=False).rstrip(),
            "---",
            f"# {front['pretty_name']}",
            "",
            "Embeddings of captions by frozen text encoders, computed once by embed_precompute for",
            "the training of text-to-video models. `embed-precompute verify .` checks every byte.",
            "",
            "| | |",
            "|---|---|",
            *(f"| {what} | {value} |" for what, value in facts.items()),
            "",
            "## Load it",
            "",
            "```python",
            "from embed_precompute import EmbeddingDataset",
            "",
            'dataset = EmbeddingDataset("path/to/this/folder")',
            f'dataset[0]  # {{"id": str, {shapes}}}',
            "dataset.null  # the embeddings of the empty caption, for condition dropout",
            "```",
            "",
        ]
    )


def _code(value: object) -> str:
    """As code in a cell of a table: nothing in it is markup."""
    words = ", ".join(value) if isinstance(value, tuple) else str(value)
    text = re.sub(r"[\x00-\x20\x7f-\x9f]+", " ", words).strip()
    return "`" + text.replace("`", "'").replace("|", "\\|") + "`"
