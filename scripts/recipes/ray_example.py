"""One Ray task per GPU, each a rank of `embed-precompute run`.

    python scripts/recipes/ray_example.py

Edit the lines marked 1, 2 and 3. It needs `pip install ray`, embed_precompute on every node, and an
output folder on a real file system that all nodes mount (docs/clusters.md; no bucket). Ray starts a
task anew when its node is lost or it ends with "run me again"; the rank then goes on.
"""

from __future__ import annotations

import os
import subprocess
import sys

import ray

# 1. How many ranks, and what each of them takes: {"num_gpus": 1}, or {"num_cpus": 1} without GPUs.
RANKS, EACH = 16, {"num_gpus": 1}
# 2. The Ray cluster; None starts one on this machine.
ADDRESS: str | None = "auto"
# 3. What to encode, and where to; paths as the nodes see them.
JOB = ["/data/opensora_v2.yaml", "--captions.path=/data/captions", "--output.path=/data/embeddings"]

RUN_ME_AGAIN = (5, 75)


def work(rank: int) -> int:
    """Returns the exit code of a rank. ConnectionError, which Ray retries: run me again."""
    place = {"RANK": str(rank), "WORLD_SIZE": str(RANKS), "LOCAL_RANK": "0"}
    command = [sys.executable, "-m", "embed_precompute", "run", *JOB]
    code = subprocess.run(command, env={**os.environ, **place}, check=False).returncode
    if code in RUN_ME_AGAIN or code < 0:
        raise ConnectionError(f"rank {rank} ended with {code}")
    return code


if __name__ == "__main__":
    ray.init(address=ADDRESS)
    task = ray.remote(max_retries=20, retry_exceptions=[ConnectionError], **EACH)(work)
    codes = ray.get([task.remote(rank) for rank in range(RANKS)])
    sys.exit(max(codes))
