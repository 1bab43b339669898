"""Processes to hurt: a rank alone, or a gang of ranks under an agent as torchrun starts them.

A start of Python with torch and transformers takes seconds, so all are forked from a server that
has imported both (the standard library's forkserver). The agent imitates torchrun: it has a
TCPStore that outlives restarts, sets the same variables, stops the gang when one rank fails, and
starts it again up to `max_restarts` times.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from faults.hooks import Hook, install
from jobs import clean_environment

# The server knows only what the environment tells it about where to find modules.
_PATHS = [Path(__file__).parents[k] / name for k, name in ((2, "."), (2, "scripts"), (1, "."))]
_FOUND = os.pathsep.join([*map(str, _PATHS), os.environ.get("PYTHONPATH", "")])
os.environ["PYTHONPATH"] = _FOUND
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["faults.preload"])
HANGS_S = 1800.0
"""When a test gives up: a machine may be many times slower than any we know."""
DRAIN_S = 30.0
"""What torchrun leaves its workers between SIGTERM and SIGKILL."""


def wait_for(condition: Callable[[], Any], timeout: float = HANGS_S, step: float = 0.005) -> bool:
    """Whether `condition()` comes true before a test that hangs must end."""
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(step)
    return True


def launch(function: Callable[..., None], *args: Any) -> ForkServerProcess:
    """`function(*args)` in a process of its own."""
    process = _CONTEXT.Process(target=function, args=args)
    process.start()
    return process


def finish(process: ForkServerProcess, timeout: float = HANGS_S) -> int:
    """The exit code; -9 when it had to be killed after `timeout`, too."""
    process.join(timeout)
    if process.exitcode is None:
        process.kill()
        process.join()
    code = process.exitcode
    process.close()
    assert code is not None
    return code


def program(words: list[str], log: str, env: dict[str, str], hooks: Sequence[Hook]) -> None:
    """The body of a rank; never returns."""
    from embed_precompute.cli.main import main

    os.environ.clear()
    os.environ.update(env)
    sink = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    source = os.open(os.devnull, os.O_RDONLY)
    for fd, stream in ((source, 0), (sink, 1), (sink, 2)):
        os.dup2(fd, stream)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(fd), "w", 1) for fd in (1, 2))
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_DFL)
    code = 1
    try:
        install(hooks)
        code = main(words)
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else 1
    finally:
        with contextlib.suppress(Exception):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)


# --- gangs ----------------------------------------------------------------------------------------


@dataclass
class Gang:
    """Ranks under an agent."""

    agent: ForkServerProcess
    group: int
    """The process group of the agent and of all it started; the agent's pid."""
    board: Path
    """The agent writes the pids of its ranks here."""

    def ranks(self) -> list[int]:
        """Pids of the ranks that are now alive, by rank."""
        pids = self.board.read_text().split() if self.board.exists() else []
        return [pid for pid in map(int, pids) if _state(pid)]

    def all_ranks(self) -> list[int]:
        """Every rank that is alive, of this start or an earlier one, on the board or not."""
        return [pid for pid in self._members() if pid != self.group]

    def agent_lives(self) -> bool:
        return self.group in self._members()

    def kill(self) -> None:
        """SIGKILL for the agent and all it started; when this returns, none of them lives."""
        with contextlib.suppress(ProcessLookupError):
            self.agent.kill()
        self.agent.join()
        self._end()

    def finish(self) -> int:
        """The agent's exit code; when this returns, nothing it started lives."""
        code = finish(self.agent)
        self._end()
        return code

    def ended(self) -> bool:
        """Whether all of them end by themselves."""
        return wait_for(lambda: not self._members(), HANGS_S, 0.02)

    def _end(self) -> None:
        # By group: an agent killed between fork and note leaves ranks that no board names.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.group, signal.SIGKILL)
        assert self.ended(), f"{self._members()} outlive SIGKILL"

    def _members(self) -> list[int]:
        """Pids of the processes of the group that run."""
        pids = [int(name) for name in os.listdir("/proc") if name.isdigit()]
        return [pid for pid in pids if _state(pid)[1:] == [str(self.group)]]


def _state(pid: int) -> list[str]:
    """[state, process group] of a process that runs; nothing for a zombie."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        state, _, group = text.rpartition(")")[2].split()[:3]
    except (OSError, ValueError):
        return []
    return [] if state in "ZX" else [state, group]


def signal_to(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def agent(
    words: list[str], log: str, hooks: list[list[Hook]], max_restarts: int, board: str
) -> None:
    os.setpgid(0, 0)
    port, server = _serve()
    code = 1
    for restart in range(max_restarts + 1):
        pids = []
        for rank, each in enumerate(hooks):
            variables: dict[str, Any] = dict.fromkeys(("RANK", "LOCAL_RANK"), rank)
            variables |= dict.fromkeys(("WORLD_SIZE", "LOCAL_WORLD_SIZE"), len(hooks))
            variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            elastic = {"RUN_ID": f"gang-{port}", "RESTART_COUNT": restart, "USE_AGENT_STORE": True}
            elastic["MAX_RESTARTS"] = max_restarts
            variables |= {f"TORCHELASTIC_{name}": value for name, value in elastic.items()}
            env = clean_environment({name: str(value) for name, value in variables.items()})
            pids.append(fork(program, words, log, env, each))
        Path(f"{board}.new").write_text(" ".join(map(str, pids)))
        os.replace(f"{board}.new", board)
        if _all_succeed(set(pids)):
            code = 0
            break
    signal_to(server, signal.SIGKILL)
    os._exit(code)


def fork(function: Callable[..., None], *args: Any) -> int:
    """The pid of a child that calls `function(*args)`, and ends with 0 if that returns."""
    pid, code = os.fork(), 1
    if pid == 0:
        try:
            function(*args)
            code = 0
        finally:
            os._exit(code)
    return pid


def _all_succeed(pids: set[int]) -> bool:
    """Wait for the gang; on the first failure stop the others, as torchrun does."""
    while pids:
        pid, status = os.waitpid(-1, 0)
        if pid not in pids:
            continue
        pids.discard(pid)
        if os.waitstatus_to_exitcode(status) == 0:
            continue
        for other in pids:
            signal_to(other, signal.SIGTERM)
        deadline = time.monotonic() + DRAIN_S
        while pids and time.monotonic() < deadline:
            pid, _ = os.waitpid(-1, os.WNOHANG)
            pids.discard(pid)
            time.sleep(0.01)
        for other in pids:
            signal_to(other, signal.SIGKILL)
            os.waitpid(other, 0)
        return False
    return True


def _serve() -> tuple[int, int]:
    """A TCPStore in a process that dies with the agent: (port, pid)."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    agent = os.getpid()

    def serve() -> None:
        from torch.distributed import TCPStore

        store = TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
        while os.getppid() == agent:
            time.sleep(0.2)
        del store

    pid = fork(serve)
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), 1):
            return port, pid
        time.sleep(0.01)
