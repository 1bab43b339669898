"""The command line: what each command calls. The only module that prints.

Guarantees: a user's mistake ends with one message and its exit code, never with a traceback; what a
command gives goes to stdout, everything else to stderr.
Costs: `--help` and parsing import neither torch nor transformers.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import functools
import importlib
import json
import logging
import os
import shlex
import signal
import socket
import sys
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from embed_precompute import __version__
from embed_precompute.cli.arguments import parse
from embed_precompute.distributed import DistContext
from embed_precompute.errors import (
    EXIT_BUG,
    EXIT_COMPLETE,
    EXIT_FAILED_SAMPLES,
    EXIT_INCOMPLETE,
    EXIT_INTERRUPTED,
    EXIT_IO,
    EXIT_USAGE,
    EXIT_VERIFICATION,
    EmbedPrecomputeError,
    InputError,
    InterruptedRunError,
    StorageError,
    found_by_every_rank,
)
from embed_precompute.samples import count_failed
from embed_precompute.steps import FILE_ONLY, Work, byte_size, counted, stderr

log = logging.getLogger(__name__)

if TYPE_CHECKING:
    from embed_precompute.config.schema import Config
    from embed_precompute.job.run import RunResult
    from embed_precompute.store.index import Manifest
    from embed_precompute.store.manifest import Finalized

MOST_ENVIRONMENTS = 3
"""As many are named in a summary."""
BEGINNING = 60
"""Characters of a message that local rank 0 says in full; a word is said to its end."""
MOST_WAITING = 1000
"""Lines that are kept for a log file that cannot be made yet."""
IO_ERRORS = frozenset(
    getattr(errno, name)
    for name in [
        "EIO",
        "ENOSPC",
        "EDQUOT",
        "EROFS",
        "ESTALE",
        "ENFILE",
        "EMFILE",
        "EACCES",
        "EPERM",
    ]
)
"""What a disk, a network or a permission answers: no bug of ours, wherever it surfaces."""


def program() -> int:
    """The installed program: `main`, which a second Ctrl-C cannot end in a traceback."""
    try:
        code = main()
    except KeyboardInterrupt:  # while the first one was being reported
        code = EXIT_INTERRUPTED
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Python's own end waits for threads
    return code


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; give its exit code."""
    _log_to_stderr(DistContext(), logging.WARNING)
    arguments, overrides = parse(sys.argv[1:] if argv is None else argv)
    dist = DistContext()
    try:
        command = COMMANDS[arguments.command]
        if command in (_run, _verify):  # a launcher may have started it
            dist = DistContext.detect()
            _log_to_stderr(dist, logging.WARNING)
        if hasattr(arguments, "config"):
            from embed_precompute.config.files import load_config, to_yaml

            with found_by_every_rank():
                config = load_config(arguments.config, overrides)
            if command is _fetch and any(w.startswith("--output.path") for w in overrides):
                log.warning(
                    "--output.path is where run writes. fetch writes to the cache folder, or with "
                    "--output FOLDER to that one."
                )
            if arguments.print_config:
                print(to_yaml(config), end="")
                return EXIT_COMPLETE
        if command in (_plan, _fetch, _bench, _verify, _repair, _finalize, _export):
            with Work("importing torch"):  # seconds; from a shared file system, minutes
                importlib.import_module("torch")
        if hasattr(arguments, "config"):
            return command(config, arguments)
        return command(arguments)
    except EmbedPrecomputeError as error:
        words = [getattr(arguments, "config", "CONFIG"), *overrides]
        message = str(error).replace("fetch CONFIG", f"fetch {shlex.join(words)}")
        if isinstance(error, InterruptedRunError):  # as the person wanted
            _say(message, dist, is_shared=True)
        else:
            _say(f"error: {message}", dist, trace=True, is_shared=error.found_by_every_rank)
        return error.exit_code
    except KeyboardInterrupt:
        _say("interrupted", dist)
        return EXIT_INTERRUPTED
    except BrokenPipeError:  # `embed-precompute info DIR | head`
        sys.stderr.close()
        return EXIT_COMPLETE
    except OSError as error:
        if error.errno not in IO_ERRORS:
            return _bug(dist)
        where = f"{error.filename}: " if error.filename else ""
        _say(
            f"error: {where}{error.strerror} ({errno.errorcode[error.errno or 0]}). Mend that and "
            "run the same command again.",
            dist,
            trace=True,
        )
        return EXIT_IO
    except Exception:
        return _bug(dist)


def _bug(dist: DistContext) -> int:
    """Report the exception at hand."""
    traceback.print_exc()
    _say(f"{__version__}: this is a bug; please report the lines above.", dist, trace=True)
    return EXIT_BUG


def _say(message: str, dist: DistContext, *, trace: bool = False, is_shared: bool = False) -> None:
    """How a command ended: on stderr, and in the log file; `trace`: there with the traceback.

    `is_shared`: local rank 0 says it for all ranks of its node, and the others how it begins, for
    it may be theirs alone after all.
    """
    shown = message
    end = message.find(" ", BEGINNING)
    if is_shared and dist.local_rank > 0 and end > 0:
        shown = f"{message[:end]} ..."
    whose = "" if dist.is_main else f"{_rank(dist)} "
    print(f"embed-precompute: {whose}{shown}", file=sys.stderr)
    log.error("%s", message, exc_info=trace, extra=FILE_ONLY)


def _rank(dist: DistContext) -> str:
    return f"[rank {dist.rank}/{dist.world_size} {socket.gethostname()}]"


class _Console(logging.StreamHandler[Any]):
    """Log lines on stderr, above the bar if there is one."""

    def emit(self, record: logging.LogRecord) -> None:
        if hasattr(record, "file_only"):
            return
        if record.levelno < logging.WARNING and not stderr.speaks:
            return
        stderr.said_at = time.monotonic()
        if "tqdm" not in sys.modules:
            super().emit(record)
            return
        from tqdm import tqdm

        with tqdm.external_write_mode(file=self.stream):
            super().emit(record)


class _LogFile(logging.FileHandler):
    """A rank's log file, to which every run adds. It is made when there is a plan: a refused run
    leaves nothing.

    A log that cannot be written (no space, no permission) stops no job: stderr has the lines too.
    """

    def __init__(self, dist: DistContext, root: Path) -> None:
        path = root / "logs" / f"rank-{dist.rank:05d}.log"
        super().__init__(path, encoding="utf-8", delay=True)
        self.setFormatter(_job_format(dist))
        self._plan, self._rank = root / "plan.json", _rank(dist)
        self._waiting: deque[logging.LogRecord] = deque(maxlen=MOST_WAITING)

    def emit(self, record: logging.LogRecord) -> None:
        self._waiting.append(record)
        with contextlib.suppress(OSError):
            if self.stream is None:
                if not self._plan.exists():
                    return
                Path(self.baseFilename).parent.mkdir(parents=True, exist_ok=True)
            while self._waiting:
                super().emit(self._waiting[0])
                self._waiting.popleft()

    def _open(self) -> Any:
        stream = super()._open()
        between = "\n" if stream.tell() else ""
        began = time.strftime("%Y-%m-%d %H:%M:%S")
        words = shlex.join(sys.argv[1:])
        stream.write(
            f"{between}==== {began} {self._rank} embed-precompute {__version__}, process "
            f"{os.getpid()}: {words}\n"
        )
        return stream

    def handleError(self, record: logging.LogRecord) -> None:  # noqa: N802
        """Called by `emit`; the default prints a traceback for each line."""


def _log_to_stderr(dist: DistContext, level: int) -> None:
    """Log lines of this level, and how far a long command is, on stderr; no other rank than 0
    says more than warnings, with its name."""
    logger, stderr.speaks = logging.getLogger("embed_precompute"), dist.is_main
    logger.setLevel(level)
    logging.getLogger("embed_precompute.steps").setLevel(logging.INFO)
    logger.propagate = False
    console = _Console(sys.stderr)
    terminal = sys.stderr is not None and sys.stderr.isatty()
    if not dist.is_main or (level == logging.INFO and not terminal):  # a job's: it is read later
        console.setFormatter(_job_format(dist))
    for earlier in logger.handlers:
        earlier.close()
    logger.handlers = [console]


def _job_format(dist: DistContext) -> logging.Formatter:
    return logging.Formatter(f"%(asctime)s {_rank(dist)} %(levelname)s %(message)s")


def _run(config: Config, arguments: Any) -> int:
    from embed_precompute.job.signals import stop_on_signals

    dist = DistContext.detect()
    _log_to_stderr(dist, logging.INFO)
    # logs/rank-NNNNN.log has everything: log lines, errors with tracebacks, the summary.
    to_file = _LogFile(dist, Path(os.path.expanduser(config.output.path)))
    logging.getLogger("embed_precompute").addHandler(to_file)
    with stop_on_signals(config.runtime.grace_s), Work("importing torch and transformers"):
        from embed_precompute.job.run import run
        from embed_precompute.job.tracker import check_tracker
    with found_by_every_rank():
        check_tracker(config.runtime.tracker)
    result = run(config, arguments.limit, dist, extend=arguments.extend, reuse=arguments.reuse)
    log.info(
        "this rank encoded %s samples in %.1f s: loading %.1f s, encoders %.1f s",
        *(f"{result.samples:,}", result.seconds, result.load_seconds, result.encode_seconds),
        extra=FILE_ONLY,
    )
    if result.finalized is None:
        return EXIT_COMPLETE  # a peer finalises, and says so
    _write_card(result.root)
    for line in _summary(result.root, result.finalized, result):
        log.info("%s", line, extra=FILE_ONLY)
        # Without torchrun's store every rank finalises.
        if dist.is_main or dist.store_host is not None:
            print(line)
    return _exit_code(result.finalized.manifest)


def _summary(root: Path, finalized: Finalized, run: RunResult | None = None) -> list[str]:
    """What all ranks of all runs made, what failed, and how to check it; `run`: the one that ends
    now."""
    from embed_precompute.audit.info import environment_words, failure_line
    from embed_precompute.job.metrics import read_effort
    from embed_precompute.job.progress import runs_so_far

    manifest, effort = finalized.manifest, read_effort(root)
    counts = manifest.counts
    lines = [
        f"{root}: complete, {counted(counts.samples, 'sample')} of "
        f"{counted(counts.rows, 'row')} in {counted(counts.units, 'shard')}, "
        f"fingerprint {manifest.fingerprint[:16]}"
    ]
    status = ", ".join(f"{name} {n:,}" for name, n in counts.status.items() if n)
    lines.append(
        f"  status: {status}; {counts.stored:,} distinct embeddings stored, "
        f"{byte_size(finalized.num_bytes)} on disk"
    )
    lines += [f"  {what}: {n:,}" for what, n in sorted(counts.noted.items())]
    for name, sums in counts.encoders.items():
        speed = "" if effort is None else effort.encoder_words(name)
        tokens = f"{sums.tokens:,} tokens, {sums.truncated:,} captions truncated"
        lines.append(f"  {name}: {tokens}{speed}")
    if run is not None and run.was_complete:
        lines.insert(0, f"{root}: nothing to do")
    elif effort is not None:
        runs = f", {counted(number, 'run')}" if (number := runs_so_far(root)) else ""
        lines.append(f"  {effort.line()}{runs}")
    made = [environment_words(each) for each in manifest.environments[:MOST_ENVIRONMENTS]]
    lines += [f"  made with {each}" for each in made]
    if (more := len(manifest.environments) - MOST_ENVIRONMENTS) > 0:
        lines.append(f"  and in {counted(more, 'other environment')}, see manifest.json")
    lines += [f"  {what}: {n:,}" for what, n in (run.copies if run is not None else {}).items()]
    if failed := failure_line(root):
        lines.append(f"  {failed}")
    return [*lines, f"  check it: embed-precompute verify {shlex.quote(str(root))}"]


def _exit_code(manifest: Manifest) -> int:
    failed = count_failed(manifest.counts.status)
    return EXIT_FAILED_SAMPLES if failed else EXIT_COMPLETE


def _plan(config: Config, arguments: Any) -> int:
    from embed_precompute.job import price
    from embed_precompute.job.claims import Committed
    from embed_precompute.job.estimate import caption_lines
    from embed_precompute.job.prepare import prepare, publish, quick_plan

    if arguments.epochs is not None and arguments.training_flops is None:
        raise InputError("--epochs is given without --training-flops, the cost of a step: add it.")
    if arguments.calibrate and arguments.no_weights:
        raise InputError("--calibrate and --no-weights exclude each other: it runs the models.")
    speed, on_cpus = None, config.runtime.device == "cpu"
    if arguments.rate is not None:
        speed = price.speed_of_rate(arguments.rate, price.CPU if on_cpus else price.GPU)
    elif on_cpus and arguments.gpu is None and not arguments.calibrate:
        speed = price.speed_of_a_cpu()
    elif not arguments.calibrate:
        dtypes = {name: options.dtype for name, options in config.encoders.items()}
        speed = price.speed_of_gpu(dtypes, arguments.gpu or "H100", arguments.share)
    training, dtype = None, config.output.dtype
    if arguments.training_flops is not None:
        training = price.Training(arguments.training_flops, arguments.epochs)
    show = functools.partial(price.price_lines, ranks=arguments.ranks, training=training)
    quick = None
    if arguments.limit is None and not arguments.reuse:
        quick = quick_plan(config, online=arguments.no_weights)
    if quick is not None:
        sampled, plan = quick
        few = counted(sampled.figures.samples, "caption")
        print(f"A first answer, from {few} at the beginnings of row groups:")
        about = price.price_of(sampled, plan, dtype, num_samples=1)
        root = Path(os.path.expanduser(config.output.path))
        for line in [*price.head_lines(plan), *show(about, None, root, speed)]:
            print(line)
        print("\nThe answer from the whole table, when every file and id is checked:", flush=True)
    prepared = prepare(
        config,
        arguments.limit,
        extend=arguments.extend,
        reuse=arguments.reuse,
        with_weights=not arguments.no_weights,
    )
    plan, sampled, root = prepared.plan, prepared.sampled, prepared.root
    figures = sampled.measured(arguments.sample or None)
    for line in [
        price.names_line(plan, has_weights=not arguments.no_weights),
        *price.head_lines(plan),
        *caption_lines(sampled, figures, plan, dtype, prepared.reuse),
    ]:
        print(line)
    if arguments.calibrate:
        from embed_precompute.job.calibrate import calibrate

        speed = calibrate(config, sampled)
    # Without weights nothing says that the units there are its own.
    left = None if arguments.no_weights else Committed(root, plan).left()
    for line in show(price.price_of(sampled, plan, dtype, figures), left, root, speed):
        print(line)
    if arguments.write:
        published = publish(prepared)
        print(f"written: {root / published.plan.file_name}")
    return EXIT_COMPLETE


def _fetch(config: Config, arguments: Any) -> int:
    from embed_precompute.encoders.fetch import fetch

    for line in fetch(config.encoders, arguments.output):
        print(line, flush=True)
    if arguments.output is None:
        print("run and plan find these copies by the configuration's pretrained and dtype")
    else:
        words = []
        for name, options in config.encoders.items():
            words += [f"--encoders.{name}.pretrained", str(arguments.output / name)]
            if options.revision is not None:  # a folder has none
                words += [f"--encoders.{name}.revision", "null"]
        print(f"use them with {shlex.join(words)}")
    return EXIT_COMPLETE


def _bench(config: Config, arguments: Any) -> int:
    from embed_precompute.bench.compare import bench

    report = bench(config, arguments.captions, arguments.rounds, arguments.variants)
    for line in report.lines():
        print(line)
    if arguments.json is not None:
        try:
            arguments.json.write_text(json.dumps(report.to_json(), indent=2) + "\n")
        except OSError as error:
            raise StorageError(f"cannot write {arguments.json}: {error.strerror}.") from None
    return EXIT_COMPLETE


def _presets(arguments: Any) -> int:
    from embed_precompute.config.presets import preset_lines, table_lines

    for line in table_lines() if arguments.name is None else preset_lines(arguments.name):
        print(line)
    return EXIT_COMPLETE


def _init(arguments: Any) -> int:
    from embed_precompute.config.starter import write_starter

    for line in write_starter(arguments.preset, arguments.captions, arguments.output):
        print(line)
    return EXIT_COMPLETE


def _doctor(arguments: Any) -> int:
    from tqdm import tqdm

    from embed_precompute.audit.doctor import collected_environment, examine

    findings = []
    for finding in examine(arguments.folder):
        findings.append(finding)
        if not arguments.json:
            tqdm.write(finding.line())  # above the bar, if there is one
            sys.stdout.flush()
    failed = sum(finding.level == "fail" for finding in findings)
    if arguments.json:
        plain = [dataclasses.asdict(finding) for finding in findings]
        report = {"usable": not failed, "findings": plain, "environment": collected_environment()}
        print(json.dumps(report, ensure_ascii=False))
    elif arguments.all:
        print(f"\n{collected_environment()}")
    return EXIT_USAGE if failed else EXIT_COMPLETE


def _status(arguments: Any) -> int:
    from embed_precompute.audit.info import read_status

    status = read_status(arguments.folder)
    if arguments.json:
        print(json.dumps(status.to_json(), ensure_ascii=False))
    else:
        for line in status.lines():
            print(line)
    if not status.complete:
        return EXIT_INCOMPLETE
    return EXIT_FAILED_SAMPLES if status.failed_samples else EXIT_COMPLETE


def _verify(arguments: Any) -> int:
    from embed_precompute.audit.shares import check_shares
    from embed_precompute.audit.verify import note_result, verify
    from embed_precompute.store.plan import read_plan

    dist = DistContext.detect()
    _log_to_stderr(dist, logging.WARNING)
    share = functools.partial(check_shares, arguments.folder, arguments.workers, dist)
    if not dist.is_main:  # rank 0 has the findings of all
        plan = None
        try:
            plan = read_plan(arguments.folder)
        except EmbedPrecomputeError as error:
            log.warning("rank %d checks nothing, rank 0 does: %s", dist.rank, error)
        if arguments.level != "quick":
            share(plan)  # without a plan, too: rank 0 may have one, and then waits for all
        return EXIT_COMPLETE
    began = time.monotonic()
    report = verify(
        arguments.folder,
        arguments.level,
        num_samples=arguments.sample,
        seed=arguments.seed,
        device=arguments.device,
        share=share,
    )
    note_result(report, time.monotonic() - began)
    for problem in report.problems:
        print(problem)
    print(report.summary())
    if report.problems:
        return EXIT_VERIFICATION
    return EXIT_COMPLETE if report.complete else EXIT_INCOMPLETE


def _repair(arguments: Any) -> int:
    from embed_precompute.audit.repair import repair

    repaired = repair(arguments.folder, failed=arguments.failed)
    for line in (*repaired.problems, *repaired.lines()):
        print(line)
    return EXIT_COMPLETE if repaired.complete else EXIT_INCOMPLETE


def _finalize(arguments: Any) -> int:
    from embed_precompute.store.manifest import finalize

    done = finalize(arguments.folder)
    for line in _summary(arguments.folder, done):
        print(line)
    if done.removed_files:
        print(
            f"  removed {counted(done.removed_files, 'file')} ({done.removed_bytes:,} bytes) that "
            "no record names"
        )
    _write_card(arguments.folder)
    return _exit_code(done.manifest)


def _info(arguments: Any) -> int:
    folder = arguments.folder
    if arguments.similar is not None:
        from embed_precompute.audit.similarity import similar_lines

        lines = similar_lines(folder, arguments.similar, arguments.top)
    elif arguments.id is not None:
        from embed_precompute.audit.sample import sample_lines

        lines = sample_lines(folder, arguments.id)
    else:
        from embed_precompute.audit.info import all_lines, dataset_lines

        lines = dataset_lines(folder)
        if arguments.all:
            lines += all_lines(folder)
    for line in lines:
        print(line)
    return EXIT_COMPLETE


def _write_card(root: Path) -> None:
    """README.md of a finished dataset, which is complete without it."""
    from embed_precompute.audit.card import write_card

    try:
        write_card(root)
    except StorageError as error:
        log.warning("README.md is not written: %s", error)


def _report(arguments: Any) -> int:
    from embed_precompute.audit.report import write_report

    for line in write_report(arguments.folder, arguments.output):
        print(line)
    return EXIT_COMPLETE


def _export(arguments: Any) -> int:
    from embed_precompute.opensora.export import OpenSoraOptions, export_opensora

    options = OpenSoraOptions(
        captions=arguments.captions,
        t5=arguments.t5,
        clip=arguments.clip,
        pad_masked=arguments.pad_masked,
        trainer_dtype=arguments.trainer_dtype,
        table_only=arguments.table_only,
        limit=arguments.limit,
        workers=arguments.workers,
    )
    for line in export_opensora(arguments.folder, arguments.out, options).lines():
        print(line)
    return EXIT_COMPLETE


COMMANDS: dict[str, Callable[..., int]] = {
    "run": _run,
    "plan": _plan,
    "fetch": _fetch,
    "presets": _presets,
    "init": _init,
    "doctor": _doctor,
    "status": _status,
    "bench": _bench,
    "verify": _verify,
    "repair": _repair,
    "finalize": _finalize,
    "info": _info,
    "report": _report,
    "export": _export,
}
"""By name; a command that takes a CONFIG gets it before the arguments."""
