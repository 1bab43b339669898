"""`python -m embed_precompute` is the program `embed-precompute`, as torchrun and srun start it."""

import sys

from embed_precompute.cli.main import program

if __name__ == "__main__":  # a worker process imports this module too
    sys.exit(program())
