"""The page of a report as HTML: its sections, tables and words, and the style.

Guarantees: the same facts give the same bytes. What is missing (logs, an index, units) leaves its
section out and says why. Every text of captions, tables and logs is escaped. The page needs nothing
else: no network, no script, no file.
"""

from __future__ import annotations

import html
import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from embed_precompute import __version__
from embed_precompute.audit import plots
from embed_precompute.audit.card import model_words, percent
from embed_precompute.audit.facts import BUCKETS, NORM_VECTORS, Facts
from embed_precompute.audit.info import DatasetStatus, encoder_words, recipe_words
from embed_precompute.audit.timeline import LEAST_GAP_S, Row, Timeline, Work
from embed_precompute.encoders.peaks import peak_flops
from embed_precompute.job.metrics import MOST, Effort
from embed_precompute.samples import Status
from embed_precompute.steps import byte_size, counted, duration
from embed_precompute.store.rows import StoredSample

BEGIN = (
    '<!doctype html><html lang="en"><head><meta charset="utf-8">'
    '<meta name="generator" content="embed-precompute report">'
)
"""How every page begins: a file that does not is somebody else's."""
LISTED = 10
"""Lines of a table of files, units or gaps."""
TEXT_CHARACTERS = 160
"""Of a caption's text that are shown."""
BARS = 64
"""At most, of a histogram."""
STATUS_WORDS = {
    Status.OK: "has an embedding",
    Status.NULL_TEXT: "the caption, or a column its recipe needs, is null",
    Status.INVALID_TEXT: "not UTF-8, or its recipe cannot be applied, or nothing of it is stored",
    Status.EMPTY_LIST: "the row's list of captions has no entry",
    Status.NON_FINITE: "the encoder gave inf or nan: repair --failed, then run again",
}


@dataclass(frozen=True)
class Dataset:
    """What the page is written from."""

    name: str
    status: DatasetStatus
    facts: Facts
    configured: Mapping[str, Mapping[str, Any]]
    """What config.yaml says of each encoder."""
    effort: Effort | None
    timeline: Timeline | None
    verified: Mapping[str, Any]
    """What `verify` left in logs/; empty if it never ran."""
    run: Mapping[str, Any]
    """run.json; empty if there is none."""


def page_of(data: Dataset) -> bytes:
    """The whole page."""
    title = _esc(_title(data))
    sections = "".join(
        f"<section><h2>{heading}</h2>{''.join(parts)}</section>"
        for heading, parts in (
            ("Samples by status", _statuses(data)),
            ("Tokens", _tokens(data)),
            ("Norms over input order", _norms(data)),
            ("Bytes", _bytes(data)),
            ("Speed of the ranks", _speed(data)),
            ("Repeated captions", _repeated(data)),
            ("Verification", _verification(data)),
            ("What was encoded", _what(data)),
            ("Runs", _runs(data)),
        )
    )
    page = (
        f"{BEGIN}"
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head><body><main>"
        f"<h1>{title}</h1>{_summary(data)}{''.join(_head(data))}{sections}"
        f"<footer>{_esc(data.name)}, embed_precompute {__version__}, "
        f"fingerprint {data.status.plan.fingerprint[:16]}</footer></main></body></html>\n"
    )
    return page.encode()


# --- sections -------------------------------------------------------------------------------------


def _title(data: Dataset) -> str:
    """The encoders' models, the captions, and the day of the last unit if logs/ has it."""
    day = "" if data.timeline is None else f", {_clock(data.timeline.end)[:10]}"
    return f"Embeddings of {_captions(data)} by {_models(data)}{day}"


def _captions(data: Dataset) -> str:
    files = data.status.plan.inputs.files
    first = Path(files[0].path).name if files else "no file"
    return first + (f" and {counted(len(files) - 1, 'other file')}" if len(files) > 1 else "")


def _models(data: Dataset) -> str:
    words = []
    for name, spec in sorted(data.status.plan.spec["encoders"].items()):
        model = (model_words(data.configured.get(name, {})) or [spec.get("model_type", "")])[0]
        words.append(f"{name} ({model})" if model else name)
    return _listed(words)


def _listed(words: Sequence[str]) -> str:
    return " and ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _summary(data: Dataset) -> str:
    """Two sentences for who reads no further."""
    status, facts, effort = data.status, data.facts, data.effort
    ok, whole = facts.totals.status[Status.OK.label], status.plan.num_samples
    time_words = ""
    if effort is not None and effort.wall_seconds:
        processes = "1 process" if effort.ranks == 1 else f"{effort.ranks:,} processes"
        time_words = f", encoded in {duration(effort.wall_seconds)} by {processes}"
    encoders, size = _listed(sorted(facts.tokens)), byte_size(sum(facts.bytes.values()))
    first = (
        f"{ok:,} of {whole:,} captions ({percent(ok, whole)}) have embeddings by {encoders}: "
        f"{size} on disk{time_words}."
    )
    found = data.verified
    day = str(found.get("time"))[:10]
    if not found:
        checked = "it was never verified"
    elif found.get("problems") != 0:
        checked = "its last verification did not end without problems"
    elif _is_newer(data):
        checked = "a unit was written after its last verification, which found no problems"
    else:
        checked = f"its last verification ({found.get('level')}, {day}) found no problems"
    state = "complete" if status.complete else "not complete yet"
    return f'<p class="lead">{_esc(first)} The dataset is <b>{state}</b>; {_esc(checked)}.</p>'


def _is_newer(data: Dataset) -> bool:
    """Whether a unit was written after the last verification."""
    when, line = data.verified.get("time"), data.timeline
    return line is not None and isinstance(when, str) and when < _stamp(line.end)


def _head(data: Dataset) -> Iterator[str]:
    """Whether it is whole, and the figures that people ask for first."""
    status, totals = data.status, data.facts.totals
    lines = [line.strip() for line in status.lines()]
    lines[0] = lines[0].removeprefix(f"{status.root}: ")
    trouble = not status.complete or status.failed_samples
    yield f'<div class="state {"warn" if trouble else "good"}">'
    if not status.complete:
        yield "<p><b>This dataset is not finished: the page shows what is there.</b></p>"
    yield "".join(f"<p>{_esc(line)}</p>" for line in lines)
    yield from (f"<p>not readable: {_esc(line)}</p>" for line in data.facts.unread[:3])
    if (more := len(data.facts.unread) - 3) > 0:
        yield f"<p>and {more:,} more files that cannot be read: run verify</p>"
    yield "</div>"
    ok, whole = totals.status[Status.OK.label], status.plan.num_samples
    tiles = {
        "samples": f"{totals.samples:,}" + f" of {whole:,}" * (totals.samples != whole),
        "with an embedding": percent(ok, whole),
        "stored embeddings": f"{totals.stored:,}",
        "bytes": byte_size(sum(data.facts.bytes.values())),
    }
    effort, line = data.effort, data.timeline
    if effort is not None and line is not None and effort.wall_seconds:
        samples = sum(work.samples for work in line.work)
        tiles["captions/s, all ranks"] = plots.compact(samples / effort.wall_seconds)
        for device, seconds in sorted(effort.seconds.items()):
            hours = "GPU hours" if device == "cuda" else "CPU process hours"
            tiles[hours] = plots.compact(seconds / 3600)
    if line is not None:
        tiles["last unit written, UTC"] = _clock(line.end)[:16]
    yield '<div class="tiles">'
    yield from (f"<div><b>{value}</b><span>{what}</span></div>" for what, value in tiles.items())
    yield "</div>"


def _what(data: Dataset) -> Iterator[str]:
    plan, names = data.status.plan, data.configured
    yield _note(
        "Are these your captions, your model and its reference? Two datasets with one fingerprint "
        "may be read together."
    )
    inputs = plan.inputs
    columns = [inputs.text_column] if isinstance(inputs.text_column, str) else inputs.text_column
    facts = [
        ("captions", f"{counted(len(inputs.files), 'file')}, {plan.num_rows:,} input rows"),
        ("text column", _esc(", ".join(columns))),
        ("id column", _esc(inputs.id_column or "none: the number of the row")),
        ("recipe", _esc(recipe_words(plan.spec.get("captions")))),
    ]
    if inputs.limit is not None:
        facts.append(("limit", f"the first {inputs.limit:,} samples"))
    if plan.extends:
        facts.append(("extended", counted(len(plan.extends), "time")))
    for name, spec in sorted(plan.spec["encoders"].items()):
        given = names.get(name, {})
        words = [given[key] for key in ("pretrained", "revision") if given.get(key)]
        lines = [_esc(" ".join(map(str, words))) or "config.yaml does not name its checkpoint"]
        lines.append(_esc(encoder_words(name, spec, plan)))
        if given.get("reference"):
            lines.append(f"settings as in {_esc(given['reference'])}")
        for key in ("weights", "tokenizer"):
            if key in spec:
                lines.append(f"{key} <code>{_esc(spec[key])}</code>")
        facts.append((f"encoder {name}", "<br>".join(lines)))
    facts.append(("fingerprint", f"<code>{plan.fingerprint}</code>"))
    facts.append(("plan", f"<code>{plan.plan_id}</code>"))
    yield _table((), facts)
    counts = [0] * len(data.facts.environments)
    for environment in data.facts.made_in.values():
        counts[environment] += 1
    keys = ["device", *sorted({key for e in data.facts.environments for key in e} - {"device"})]
    yield "<h3>Environments</h3>"
    if len(counts) > 1:
        yield _note("More than one: bytes are promised within one, so compare the norms above.")
    yield _table(
        ("", *(counted(number, "unit") for number in counts)),
        [
            (
                _esc(key).replace("_", "_<wbr>"),
                *(_esc(e.get(key, "")) for e in data.facts.environments),
            )
            for key in keys
        ],
        kind="facts",
    )
    yield "<h3>Input files</h3>"
    files = [
        (
            _esc(each.path),
            f"{each.rows:,}",
            byte_size(each.bytes),
            f"<code>{each.content_xxh3}</code>",
        )
        for each in inputs.files
    ]
    yield _table(("file", "#rows", "#bytes", "XXH3-128"), files, "files")


def _statuses(data: Dataset) -> Iterator[str]:
    totals = data.facts.totals
    what = "Every input row is" if data.status.complete else "The samples of committed units are"
    yield _note(f"{what} here. Only ok has an embedding; look at who has none, and why.")
    rows = [
        (status.label, f"{n:,}", percent(n, totals.samples), STATUS_WORDS[status])
        for status in Status
        if (n := totals.status[status.label]) or status is Status.OK
    ]
    yield _table(("status", "#samples", "#share", "meaning"), rows)
    if noted := sorted(totals.noted.items()):
        yield "<h3>Noted of them</h3>"
        shares = [(_esc(what), f"{n:,}", percent(n, totals.samples)) for what, n in noted]
        yield _table(("what", "#samples", "#share"), shares)
    plan = data.status.plan
    for label, samples in data.facts.examples.items():
        if samples:
            yield f"<h3>{label}: the first</h3>"
            found = [
                (
                    f"<bdi>{_esc(_shown(each.sample_id))}</bdi>",
                    _esc(plan.place(each.row).removesuffix(f" (row {each.row} of the dataset)")),
                    _outcome(each),
                )
                for each in samples
            ]
            yield _table(
                ("id", "place", "text" if label == "ok" else "why, and text"), found, kind="texts"
            )


def _tokens(data: Dataset) -> Iterator[str]:
    yield _note(
        "Samples by tokens, special tokens included. Orange: captions that the limit cut. Where "
        "they are many, a higher max_length may be worth its bytes."
    )
    totals = data.facts.totals
    for name, counts in sorted(data.facts.tokens.items()):
        total = counts.total()
        if not total:
            yield f"<p>{name}: no sample has an embedding.</p>"
            continue
        spec, cut = data.status.plan.spec["encoders"][name], totals.truncated[name]
        limit = spec.get("max_length")
        limit = limit if isinstance(limit, int) and 0 < limit < 10**6 else None
        most = max(max(counts), limit if limit is not None and cut else 0)
        each = -(-(most + 1) // BARS)
        bars = [0] * (most // each + 1)
        for tokens, count in counts.items():
            bars[tokens // each] += count
        top = each * len(bars)
        ticks = [t for t in plots.number_axis(0, top, whole=True).ticks if t[0] <= top]
        mark = None
        if limit is not None and limit <= most:
            mark = (float(top), f"limit {limit}: {cut:,} cut, {percent(cut, total)}")
        beside = [f"mean {totals.tokens[name] / total:.1f}"]
        beside += [f"{what} {_percentile(counts, share)}" for what, share in MARKS.items()]
        if mark is None:
            at = f" at {limit}" if limit else ""
            beside.append(f"{cut:,} cut{at}, {percent(cut, total)}")
        wide = f", {each} to a bar" if each > 1 else ""
        yield _figure(
            f"<b>{name}</b>, samples by number of tokens{wide}: {', '.join(beside)}",
            plots.histogram(
                bars,
                plots.Axis(0, top, ticks),
                label=f"tokens of {name}",
                mark=mark,
                last=min(cut, bars[-1]) if mark else 0,
            ),
        )


def _norms(data: Dataset) -> Iterator[str]:
    facts, plan = data.facts, data.status.plan
    yield _note(
        "A level line is right. A step or a slope means that captions changed, or the encoder "
        f"did. Line: mean, band: least and most of {facts.num_norms:,} stored rows that were read, "
        f"per token the mean over up to {NORM_VECTORS} of a caption's own tokens. The scale need "
        "not begin at 0."
    )
    if facts.elsewhere:
        yield _note("Shaded: units made in another environment than most.", "key other")
    if not facts.num_norms:
        yield "<p>Left out: no stored row could be read.</p>"
        return
    for tensor in plan.tensors:
        norms = facts.norms[tensor.name]
        points = [
            (
                (bucket + 0.5) * plan.num_rows / BUCKETS,
                float(norms.low[bucket]),
                float(norms.total[bucket] / norms.count[bucket]),
                float(norms.high[bucket]),
            )
            for bucket in range(BUCKETS)
            if norms.count[bucket]
        ]
        if not points:
            yield f"<p>text_{tensor.name}: no vector was read.</p>"
            continue
        ticks = plots.number_axis(0, plan.num_rows, whole=True).ticks
        x = plots.Axis(0, plan.num_rows, [t for t in ticks if t[0] <= plan.num_rows])
        yield _figure(
            f"<b>text_{tensor.name}</b>, L2 norm {'' if tensor.per_caption else 'per token '}by "
            "input row",
            plots.band(points, x, marked=facts.elsewhere, label=f"norms of {tensor.name}"),
        )


def _bytes(data: Dataset) -> Iterator[str]:
    sizes, samples = data.facts.bytes, max(1, data.facts.totals.samples)
    total, longest = sum(sizes.values()), max(1, *sizes.values())
    yield _note(
        f"{byte_size(total)} in all, {byte_size(total / samples)} a sample. The longest bar is "
        "what to save: another mask, another max_length or another dtype."
    )
    rows = [
        (_esc(what), byte_size(n), byte_size(n / samples), plots.share_bar(n / longest))
        for what, n in sizes.items()
    ]
    yield _table(("what", "#bytes", "#a sample", ""), rows, kind="bars")


def _speed(data: Dataset) -> Iterator[str]:
    line = data.timeline
    yield _note(
        "Even lanes of one height are right. A low lane is a slow GPU or host; grey is a "
        "rank at rest: between runs, or at the end, when others still had units."
    )
    if line is None:
        yield "<p>Left out: logs/ has no metrics-NNNNN.jsonl, which runs write beside the data.</p>"
        return
    yield from _over_time(line, line.rates(lambda work: work.samples), "captions/s", plots.compact)
    peak, reason = _peak_seconds(data)
    yield "<h3>Share of peak</h3>"
    if reason:
        yield f"<p>Left out: {_esc(reason)}.</p>"
    else:
        rows = line.rates(lambda work: peak[work])
        busy = sum(work.seconds for work in line.work)
        yield _note(
            f"Operations of the layers over what the device's maker promises: "
            f"{100 * sum(peak.values()) / (busy or 1):.3g} % over all units. Matrix products "
            "alone reach 50 to 80 %."
        )
        yield from _over_time(line, rows, "share of peak", lambda share: f"{100 * share:.3g} %")
    rests = line.rests()
    yield "<h3>Idle gaps</h3>"
    paused = sum(end - begin for begin, end in line.pauses)
    idle = sum(rest.end - rest.begin for rest in rests)
    whole = idle + sum(work.seconds for work in line.work)
    if line.pauses:
        yield (
            f"<p>Between runs nothing was at work: {counted(len(line.pauses), 'time')}, "
            f"{duration(paused)} together. That is no idleness and not counted here.</p>"
        )
    yield _note(
        f"While runs had them, ranks wrote nothing for {percent(idle, whole)} of their time "
        f"({duration(whole)} of {counted(len(line.by_rank), 'rank')} together). Gaps under "
        f"{LEAST_GAP_S:g} s do not count."
    )
    found = [
        (str(r.rank), _clock(r.begin), _clock(r.end), duration(r.end - r.begin)) for r in rests
    ]
    yield _table(("#rank", "from", "to", "#idle"), found, "gaps")
    yield "<h3>Slowest units</h3>"
    yield _note("A rank's first unit after a start includes loading and compiling.")
    slow = sorted((w for w in line.work if w.unit >= 0), key=lambda w: (-w.seconds, w.unit, w.rank))
    slowest = [
        (
            str(work.unit),
            str(work.rank),
            _esc(work.host) or "not noted",
            f"{work.seconds:,.1f}",
            plots.compact(work.samples / work.seconds) if work.seconds else "",
        )
        for work in slow[:LISTED]
    ]
    yield _table(("#unit", "#rank", "host", "#seconds", "#captions/s"), slowest)


def _over_time(
    line: Timeline, rows: dict[int, Row], what: str, words: Callable[[float], str]
) -> Iterator[str]:
    """A plot of what each rank did over time; `words` puts a value into words."""
    found = sorted(v for row in rows.values() for v in row if v)
    most = found[int(0.98 * (len(found) - 1))] if found else 0.0  # one odd unit must not set it
    above = ", 2 % of the time above it" if found and found[-1] > most else ""
    x = plots.time_axis(line.seconds)
    begun = f"time from {_clock(line.begin)}"
    if len(rows) <= plots.MAX_LANES:
        names = [f"rank {rank}{_hosts(line.by_rank[rank])}" for rank in rows]
        yield _figure(
            f"<b>{what}</b> of each rank; a lane's full height is {words(most)}{above}; {begun}",
            plots.lanes(names, list(rows.values()), x, most=most, label=f"{what} of each rank"),
        )
        return
    each = -(-len(rows) // plots.MAX_HEAT_ROWS)
    ranks, values = list(rows), list(rows.values())
    names, shades = [], []
    for first in range(0, len(ranks), each):
        part = values[first : first + each]
        names.append(str(ranks[first]))
        columns = ([v for v in column if v is not None] for column in zip(*part, strict=True))
        shades.append([sum(column) / len(part) if column else None for column in columns])
    most = max((v for row in shades for v in row if v is not None), default=0.0)
    together = f"{each} neighbours to a row" if each > 1 else "a row each"
    yield _figure(
        f"<b>{what}</b> of {len(ranks):,} ranks, {together}; darkest: {words(most)}; {begun}",
        plots.heat(names, shades, x, most=most, label=f"{what} by rank and time"),
    )


def _peak_seconds(data: Dataset) -> tuple[dict[Work, float], str]:
    """What each unit would take at the device's peak, or why that is not known."""
    assert data.timeline is not None
    encoders, found = data.status.plan.spec["encoders"], {}
    for work in data.timeline.work:
        if work.flops is None:
            return {}, "lines of an older release do not say how many operations a unit took"
        made = data.facts.made_in.get(work.unit, 0)
        device = data.facts.environments[made].get("device", "") if data.facts.environments else ""
        seconds = 0.0
        for name, flops in work.flops.items():
            spec = encoders.get(name, {})
            if spec.get("tf32"):
                return {}, f"the peak of {device} with TF32 is not in our table"
            peak = peak_flops(device, str(spec.get("dtype")))
            if peak is None:
                return {}, f"the peak of {device or 'the device'} is not in our table"
            seconds += flops / peak
        found[work] = seconds
    return found, ""


def _repeated(data: Dataset) -> Iterator[str]:
    facts, ok = data.facts, data.facts.totals.status[Status.OK.label]
    yield _note(
        "Equal texts of the whole dataset. A text that comes in hundreds is often a placeholder "
        "that should not train a model. Equal texts of one unit share a stored row."
    )
    yield (
        f"<p>{facts.num_repeats:,} of {facts.num_compared:,} samples "
        f"({percent(facts.num_repeats, facts.num_compared)}) repeat the text of an earlier one; "
        f"{counted(facts.num_repeated, 'text')} come{'s' * (facts.num_repeated == 1)} more than "
        f"once. {facts.num_sharing:,} of these samples use the stored row of another.</p>"
    )
    if (rest := ok - facts.num_compared) > 0:
        yield f"<p>{counted(rest, 'sample')} not compared: see the top of this page.</p>"
    if facts.repeated:
        rows = [
            (f"{n:,}", f"<bdi>{_esc(_shown(each.sample_id))}</bdi>", _text(each.text or ""))
            for n, each in facts.repeated
        ]
        yield _table(("#samples", "the first of them", "text"), rows, kind="texts")


def _verification(data: Dataset) -> Iterator[str]:
    found = data.verified
    if not found:
        yield "<p>Never verified: <code>embed-precompute verify DIR</code> reads every byte.</p>"
        return
    problems, when = found.get("problems"), found.get("time")
    number = _noted(problems, lambda number: counted(int(number), "problem"))
    yield _note("What the last verify said. Units that were written later are not in it.")
    yield _table(
        (),
        [
            ("outcome", "no problems" if problems == 0 else f"<b>{number}</b>"),
            ("level", _esc(found.get("level"))),
            ("dataset then", "complete" if found.get("complete") is True else "not complete"),
            ("when", _esc(when)),
            ("read", _noted(found.get("bytes"), byte_size)),
            ("took", _noted(found.get("seconds"), duration)),
        ],
    )
    if _is_newer(data):
        yield "<p><b>A unit was written after that: verify again.</b></p>"
    first = found.get("first")
    for problem in first[:LISTED] if isinstance(first, list) else ():
        yield f"<p>{_esc(_shown(problem, 400))}</p>"


def _runs(data: Dataset) -> Iterator[str]:
    yield _note("Each start that had units left. Many short ones: the job dies early, see logs/.")
    run = data.run
    starts = run.get("runs", [run] if run else [])
    if not isinstance(starts, list) or not starts:
        yield "<p>Left out: run.json is missing.</p>"
        return
    rows = []
    for each in starts:
        if isinstance(each, dict):
            command = each.get("command")
            words = " ".join(map(str, command)) if isinstance(command, list) else str(command)
            rows.append(
                (
                    _esc(each.get("started", "")),
                    _esc(each.get("world_size", "")),
                    _esc(each.get("launched_by", "")),
                    f"<code>{_esc(_shown(words, 300))}</code>",
                )
            )
    yield _table(("started", "#world size", "launched by", "command"), rows[::-1], "starts")


# --- words ----------------------------------------------------------------------------------------

MARKS = {"p5": 0.05, "median": 0.5, "p95": 0.95, "most": 1.0}


def _percentile(counts: Mapping[int, int], share: float) -> int:
    below, wanted = 0, share * sum(counts.values())
    for value in sorted(counts):
        below += counts[value]
        if below >= wanted:
            return value
    return max(counts)


def _esc(value: object) -> str:
    return html.escape(_visible(str(value)))


def _visible(text: str) -> str:
    """Control characters and lone surrogates as escapes, which a page may not hold."""
    return re.sub(
        r"[\x00-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]",
        lambda found: found[0].encode("unicode_escape").decode(),
        text,
    )


def _shown(value: object, most: int = TEXT_CHARACTERS) -> str:
    text = str(value)
    return text if len(text) <= most else f"{text[:most]}… ({len(text):,} characters)"


def _outcome(sample: StoredSample) -> str:
    """Why it has no embedding, and its text."""
    parts = [] if sample.error is None else [_esc(_shown(sample.error))]
    return "<br>".join(parts if sample.text is None else [*parts, _text(sample.text)])


def _text(text: str) -> str:
    """A caption: its direction is its own and leaves the page's alone."""
    return f'<bdi dir="auto">{_esc(_shown(text))}</bdi>' if text else "(empty)"


def _noted(value: object, words: Callable[[float], str]) -> str:
    """A figure of a file for people, where anything may stand."""
    return words(value) if isinstance(value, int | float) and 0 <= value < MOST else "not noted"


def _clock(seconds: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


def _stamp(seconds: float) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


def _hosts(work: Iterable[Work]) -> str:
    hosts = list(dict.fromkeys(each.host for each in work if each.host))
    return f", {hosts[-1]}" + (" and others" if len(hosts) > 1 else "") if hosts else ""


def _note(words: str, kind: str = "note") -> str:
    return f'<p class="{kind}">{words}</p>'


def _figure(caption: str, plot: str) -> str:
    return f"<figure><figcaption>{caption}</figcaption>{plot}</figure>"


def _table(
    head: Sequence[str], rows: Sequence[Sequence[str]], more: str = "", kind: str = ""
) -> str:
    """Cells are HTML; `#` before a heading puts the column to the right. `more` names the rows:
    only the first LISTED are shown, and how many more there are. `kind`: a class of STYLE."""
    if not rows:
        return "<p>None.</p>"
    right = [each.startswith("#") for each in head] or [False] * len(rows[0])
    parts = ["".join(f"<th{_side(h[:1] == '#')}>{h.lstrip('#')}</th>" for h in head)]
    for row in rows[:LISTED] if more else rows:
        cells = zip(row, right, strict=True)
        parts.append("".join(f"<td{_side(r)}>{cell}</td>" for cell, r in cells))
    body = "".join(f"<tr>{part}</tr>" for part in parts if part)
    rest = len(rows) - LISTED if more else 0
    after = f"<p>and {rest:,} more {more}</p>" if rest > 0 else ""
    kind = kind or ("facts" if not head else "plain")
    return f'<div class="wide"><table class="{kind}">{body}</table></div>{after}'


def _side(right: bool) -> str:
    return ' class="n"' if right else ""


# Colours of Okabe and Ito, which colour-blind people tell apart; blue and orange also differ in
# lightness, so that they do on paper.
STYLE = """
:root{color-scheme:light dark;--bg:#fff;--fg:#1a1a1a;--dim:#5c5c5c;--rule:#d9d9d9;--c1:#0072b2;
--c2:#d55e00;--c3:#e6c36a;--rest:#ececec;--soft:#f4f6f8;--good:#e5f3ec;--warn:#fdeadb}
@media screen and (prefers-color-scheme:dark){:root{--bg:#15181c;--fg:#e8e8e8;--dim:#a2a8ae;
--rule:#3a4047;--c1:#56b4e9;--c2:#ff9d4d;--c3:#6b5a24;--rest:#24292f;--soft:#1e2329;--good:#17322a;
--warn:#43290f}}
*{box-sizing:border-box}
body{margin:0;background:var(--bg);color:var(--fg);font:15px/1.5 system-ui,sans-serif}
main{max-width:60rem;margin:0 auto;padding:1rem}
h1{font-size:1.6rem;margin:.5rem 0;overflow-wrap:anywhere}
h2{font-size:1.25rem;margin:2.2rem 0 .4rem;border-bottom:1px solid var(--rule)}
h3{font-size:1rem;margin:1.3rem 0 .3rem}
p{margin:.4rem 0;overflow-wrap:anywhere}
.lead{font-size:1.05rem;margin:.6rem 0 1rem}
.note,figcaption,footer,.key{color:var(--dim);font-size:.9rem}
.key.other::before{content:"";display:inline-block;width:1em;height:1em;margin-right:.5em;
vertical-align:-.15em;background:var(--c3)}
.state{padding:.5rem .8rem;border-left:4px solid var(--c1);background:var(--good)}
.state.warn{border-color:var(--c2);background:var(--warn)}
.tiles{display:grid;grid-template-columns:repeat(auto-fill,minmax(10rem,1fr));gap:.6rem;
margin:1rem 0}
.tiles div{background:var(--soft);padding:.5rem .7rem;min-width:0}
.tiles b{display:block;font-size:1.15rem;line-height:1.3;overflow-wrap:anywhere}
.tiles span{color:var(--dim);font-size:.85rem}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-size:.88rem}
td,th{padding:.25rem 1.2rem .25rem 0;text-align:left;vertical-align:top;
border-bottom:1px solid var(--rule);overflow-wrap:break-word}
th{font-weight:600;color:var(--dim)}
.n{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
.facts,.bars,.texts{width:100%}
.facts td{overflow-wrap:anywhere}
.facts td:first-child{color:var(--dim);width:10rem}
.bars td:last-child{width:45%;padding-right:0;vertical-align:middle}
.bars svg{display:block}
.texts td:last-child{overflow-wrap:anywhere}
.texts td:not(:last-child){min-width:9.5rem;max-width:16rem}
@media (max-width:640px){.texts tr,.texts td{display:block;text-align:left}
.texts tr:first-child{display:none}.texts td{border:0;padding:0;max-width:none!important;
overflow-wrap:anywhere}
.texts tr{border-bottom:1px solid var(--rule);padding:.3rem 0}.facts td:first-child{width:6.5rem}
td,th{padding-right:.7rem}.bars td:last-child{width:22%}}
code{font-size:.92em;overflow-wrap:anywhere}
bdi{unicode-bidi:isolate}
figure{margin:1rem 0;break-inside:avoid}
figcaption b{color:var(--fg)}
.plot{display:flex;margin-top:.3rem}
.plot>svg{display:block;overflow:visible}
.plot .y{flex:none}
.plot .x{flex:1;min-width:0}
svg text{font:12px system-ui,sans-serif;fill:var(--dim)}
.bar,.heat{fill:var(--c1)}
.cut{fill:var(--c2)}
.band{fill:var(--c1);fill-opacity:.28}
.line{fill:none;stroke:var(--c1);stroke-width:2;vector-effect:non-scaling-stroke}
.other{fill:var(--c3)}
.rest{fill:var(--rest)}
.grid{stroke:var(--rule)}
.tick{stroke:var(--dim)}
.mark{stroke:var(--c2);stroke-width:2;stroke-dasharray:5 3}
footer{margin:2.5rem 0 1rem;overflow-wrap:anywhere}
@media print{main{max-width:none;padding:0}section{break-inside:auto}h2,h3{break-after:avoid}
tr{break-inside:avoid}*{-webkit-print-color-adjust:exact;print-color-adjust:exact}
.wide{overflow:visible}}
"""
