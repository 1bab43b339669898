"""logs/metrics-NNNNN.jsonl: a line for each unit that a rank wrote; what the job cost follows.

These files are for people: no digest covers them, and the dataset does not need them.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import socket
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from embed_precompute.steps import duration

log = logging.getLogger(__name__)
LEAST_TFLOPS = 0.001
"""Less is not mentioned."""
MOST = 1e24
"""No figure of a unit is as large: a line that has such a number, or NaN, is damaged."""
LAST_TIME = 1e10
"""No clock shows so many seconds since 1970."""


class UnitLog:
    """The file of one rank."""

    def __init__(self, root: Path, rank: int, device: str) -> None:
        """`device`: cpu or cuda."""
        self._path = root / "logs" / f"metrics-{rank:05d}.jsonl"
        self._device, self._host = device, socket.gethostname()
        self._written_at = time.monotonic()

    def add(
        self,
        unit: int,
        *,
        samples: int,
        stored: int,
        copied: Mapping[str, int],
        damaged: int,
        failed: int,
        tokens: Mapping[str, int],
        flops: Mapping[str, float],
        shard_bytes: int,
    ) -> None:
        """Appends a line for a unit. Its `seconds` are those since this rank's last unit, or since
        its start: they add up to the time that the rank was at work."""
        before, self._written_at = self._written_at, time.monotonic()
        line = {
            "time": round(time.time(), 3),
            "unit": unit,
            "samples": samples,
            "stored": stored,
            "copied": dict(copied),
            "damaged": damaged,
            "failed": failed,
            "tokens": dict(tokens),
            "flops": dict(flops),
            "shard_bytes": shard_bytes,
            "seconds": round(self._written_at - before, 4),
            "device": self._device,
            "host": self._host,
        }
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("ab+") as file:
                begin = b""
                if file.seek(0, os.SEEK_END):
                    file.seek(-1, os.SEEK_END)
                    begin = b"\n" * (file.read(1) != b"\n")  # a crash cut the last line off
                file.write(begin + json.dumps(line).encode() + b"\n")
        except OSError as error:
            log.warning("%s: not written: %s", self._path, error.strerror)


class UnitLines:
    """The lines of every rank's file, also as they grow."""

    def __init__(self, root: Path) -> None:
        self._folder = root / "logs"
        self._read: dict[Path, int] = {}
        """File -> how many of its bytes were read."""

    def new(self) -> Iterator[tuple[int, Any]]:
        """Yields (rank, what a line holds) for every line that was not yielded before. All numbers
        in it are finite and below MOST; lines with others are left out."""
        for path in sorted(self._folder.glob("metrics-*.jsonl")):
            rank = path.stem.partition("-")[2]
            if not rank.isdecimal():
                continue
            with contextlib.suppress(OSError), path.open("rb") as file:
                file.seek(self._read.get(path, 0))
                for line in file:
                    if not line.endswith(b"\n"):
                        break  # it is being written, or a crash cut it off
                    self._read[path] = file.tell()
                    with contextlib.suppress(ValueError, RecursionError):
                        found = json.loads(
                            line, parse_float=_sane, parse_int=_sane, parse_constant=_sane
                        )
                        yield int(rank), found


def _sane(digits: str) -> float:
    """A number of a line. Raises ValueError if it cannot be one."""
    value = float(digits)
    if not abs(value) < MOST:
        raise ValueError(f"{digits[:30]} is no figure of a unit")
    return int(value) if value.is_integer() else value


def span_of(line: Any) -> tuple[float, float]:
    """When a rank began and ended what a line is of, in seconds since 1970.

    Raises LookupError, TypeError or ValueError if the line does not say.
    """
    end, seconds = line["time"], line["seconds"]
    if not (0 <= seconds <= end < LAST_TIME):
        raise ValueError(f"from {end} - {seconds} to {end}")
    return end - seconds, end


@dataclass
class UnitSums:
    """What lines of metrics add up to; the null embedding is left out."""

    samples: int = 0
    shard_bytes: int = 0
    tokens: Counter[str] = field(default_factory=Counter)
    flops: Counter[str] = field(default_factory=Counter)
    failed: dict[int, int] = field(default_factory=dict)
    """Unit -> failed samples, as the last line says that was read of it."""

    def add(self, line: Any) -> None:
        """A line, as `UnitLines` yields it; one of another version may lack some keys."""
        with contextlib.suppress(LookupError, TypeError, AttributeError):
            if line["unit"] < 0:
                return
            self.samples += line["samples"]
            self.tokens.update(line["tokens"])
            self.shard_bytes += line["shard_bytes"]
            self.flops.update(line["flops"])
            self.failed.pop(line["unit"], None)
            if line["failed"]:
                self.failed[line["unit"]] = line["failed"]


@dataclass(frozen=True)
class Effort:
    """What all ranks of all runs together did, by the lines of their files."""

    ranks: int
    """How many ranks wrote a line."""
    seconds: Mapping[str, float]
    """Device -> the ranks' time at work with it, added up."""
    wall_seconds: float
    """Time in which at least one rank was at work."""
    sums: UnitSums

    def line(self) -> str:
        """For a person."""
        hours = ", ".join(
            f"{seconds / 3600:,.3f} {'GPU' if device == 'cuda' else 'CPU process'} hours"
            for device, seconds in sorted(self.seconds.items())
        )
        captions = self.sums.samples / self.wall_seconds if self.wall_seconds else 0.0
        rate = f", {captions:,.1f} captions/s" if captions else ""
        ranks = "1 process" if self.ranks == 1 else f"{self.ranks:,} ranks"
        return f"encoded in {duration(self.wall_seconds)} by {ranks}, {hours}{rate}"

    def encoder_words(self, name: str) -> str:
        """How fast an encoder was, beside all others; "" if nobody knows."""
        if not (self.sums.tokens[name] and self.wall_seconds):
            return ""
        tflops = self.sums.flops[name] / self.wall_seconds / 1e12
        speed = f", {tflops:,.3g} TFLOP/s" if tflops >= LEAST_TFLOPS else ""
        return f"; {self.sums.tokens[name] / self.wall_seconds:,.0f} tokens/s{speed}"


def read_effort(root: Path) -> Effort | None:
    """What the files in logs/ say; None if there are none."""
    seconds: Counter[str] = Counter()
    spans: list[tuple[float, float]] = []
    sums = UnitSums()
    ranks = set()
    for rank, line in UnitLines(root).new():
        with contextlib.suppress(LookupError, TypeError, ValueError):
            span = span_of(line)
            seconds[line["device"]] += line["seconds"]
            spans.append(span)
            ranks.add(rank)
            sums.add(line)
    if not spans:
        return None
    wall_seconds, until = 0.0, 0.0
    for begin, end in sorted(spans):
        wall_seconds += max(0.0, end - max(begin, until))
        until = max(until, end)
    return Effort(len(ranks), dict(seconds), wall_seconds, sums)


def read_copies(root: Path) -> dict[str, int]:
    """How many embeddings all ranks copied and encoded, by the lines of their files.

    The keys are for people, such as `t5 copied`.
    """
    counts: Counter[str] = Counter()
    damaged = 0
    for _, line in UnitLines(root).new():
        with contextlib.suppress(LookupError, TypeError, AttributeError):
            for name in line["tokens"] if line["unit"] >= 0 else ():
                copied = line["copied"].get(name, 0)
                counts[f"{name} copied"] += copied
                counts[f"{name} encoded"] += line["stored"] - copied
            damaged += line["damaged"]
    return {**counts, **({"damaged, so encoded": damaged} if damaged else {})}
