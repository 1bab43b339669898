"""A real Slurm on this machine: munged, slurmctld and some slurmd, which pass for nodes.

It needs Debian's `slurm-wlm` (22.05 or newer) with `munge`, and no root: it runs as whoever tests.
"""

from __future__ import annotations

import contextlib
import getpass
import os
import secrets
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

NEEDED = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "scontrol", "scancel")
SEARCHED = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
HANGS_S = 300.0
"""When a test gives up: a machine may be many times slower than any we know."""
CONF = """\
ClusterName=local
SlurmctldHost={host}(127.0.0.1)
SlurmUser={user}
SlurmdUser={user}
AuthType=auth/munge
# Slurm starts a requeued job after the lifetime of its credentials: 120 s, at least 5 s.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
SlurmctldPort={port}
SlurmdParameters=config_overrides
SlurmdTimeout=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SchedulerParameters=bf_interval=1,sched_interval=1,batch_sched_delay=0
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
ReturnToService=2
KillWait=30
MpiDefault=none
SwitchType=switch/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
GresTypes=gpu
PartitionName=low Nodes=ALL Default=YES PriorityTier=1 PreemptMode=REQUEUE GraceTime=60
PartitionName=high Nodes=ALL PriorityTier=10 PreemptMode=OFF
"""
NODE = "NodeName={name} NodeHostname={host} NodeAddr=127.0.0.1 Port={port} CPUs=4 Gres=gpu:2"


class Cluster:
    """Daemons in `folder`, whose path must be short: that of a socket has 107 bytes at most."""

    def __init__(self, folder: Path, nodes: int) -> None:
        self.folder = folder
        self.nodes = [f"n{k}" for k in range(1, nodes + 1)]
        self.env = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("SLURM_", "SBATCH_"))},
            "PATH": SEARCHED,
            "SLURM_CONF": str(folder / "slurm.conf"),
        }

    def start(self) -> None:
        """Raises RuntimeError with what a daemon said if a node does not come up."""
        host, user = socket.gethostname().partition(".")[0], getpass.getuser()
        ports = free_ports(1 + len(self.nodes))
        conf = CONF.format(host=host, user=user, folder=self.folder, port=ports[0])
        nodes = [
            NODE.format(name=name, host=host, port=port)
            for name, port in zip(self.nodes, ports[1:], strict=True)
        ]
        (self.folder / "slurm.conf").write_text("\n".join([conf, *nodes, ""]))
        (self.folder / "gres.conf").write_text("Name=gpu File=/dev/null\nName=gpu File=/dev/zero\n")
        key = self.folder / "munge.key"
        key.write_bytes(secrets.token_bytes(1024))
        key.chmod(0o400)
        for name in ("state", *(f"spool-{name}" for name in self.nodes)):
            (self.folder / name).mkdir()
        munge = {
            "key-file": key,
            **{f"{what}-file": self.folder / f"munge.{what}" for what in ("pid", "log", "seed")},
            "socket": self.folder / "munge.socket",
        }
        self._ask("munged", "--force", *(f"--{name}={path}" for name, path in munge.items()))
        self._ask("slurmctld")
        for name in self.nodes:
            self.start_node(name)
        idle = ["idle"] * 2 * len(nodes)  # in both partitions
        if not wait_for(lambda: self.say("sinfo", "-hNo", "%T").split() == idle, 60):
            raise RuntimeError(f"the nodes are not idle: {self.say('sinfo', '-N')}")

    def start_node(self, name: str) -> None:
        self._ask("slurmd", "-N", name)

    def stop(self) -> None:
        """Ends all jobs and daemons."""
        subprocess.run(["scancel", "--user", getpass.getuser()], env=self.env, check=False)
        wait_for(lambda: not self.say("squeue", "-h"), 60)
        files = list(self.folder.glob("*.pid"))
        for path in files:
            end(int(path.read_text()), signal.SIGTERM)
        wait_for(lambda: not any(path.exists() for path in files), 60)  # each removes its own

    def _ask(self, *words: object) -> str:
        done = subprocess.run(
            [str(word) for word in words], env=self.env, capture_output=True, text=True, check=False
        )
        if done.returncode != 0:
            raise RuntimeError(f"{words[0]}: {done.stderr.strip() or done.stdout.strip()}")
        return done.stdout.strip()

    def say(self, *words: str) -> str:
        """What a command of Slurm answers; nothing while the controller is busy."""
        return subprocess.run(
            words, env=self.env, capture_output=True, text=True, check=False
        ).stdout.strip()

    def submit(self, *words: str) -> str:
        return self._ask("sbatch", "--parsable", *words)

    def about(self, job: str, key: str) -> str:
        """A field of `scontrol show job`, of the first element if the job is an array."""
        for word in self.say("scontrol", "show", "job", job).split():
            name, _, value = word.partition("=")
            if name == key:
                return value
        return ""

    def crash(self, node: str) -> int:
        """SIGKILL for all that runs on a node: slurmd, its steps and their processes, which are
        counted."""
        killed = 0
        mine = {f"SLURM_CONF={self.env['SLURM_CONF']}".encode(), f"SLURMD_NODENAME={node}".encode()}
        end(int((self.folder / f"slurmd-{node}.pid").read_text()), signal.SIGKILL)
        for process in Path("/proc").glob("[0-9]*"):
            try:
                if mine <= set((process / "environ").read_bytes().split(b"\0")):
                    parent = int((process / "stat").read_text().rpartition(")")[2].split()[1])
                    if b"slurmstepd" in Path(f"/proc/{parent}/cmdline").read_bytes():
                        end(parent, signal.SIGKILL)
                    end(int(process.name), signal.SIGKILL)
                    killed += 1
            except OSError:
                continue
        return killed


def missing() -> list[str]:
    return [name for name in NEEDED if shutil.which(name, path=SEARCHED) is None]


def wait_for(condition: Callable[[], object], timeout: float = HANGS_S) -> bool:
    deadline = time.monotonic() + timeout
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def end(pid: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def free_ports(count: int) -> list[int]:
    sockets = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports
