"""The program `embed-precompute`, which is also `python -m embed_precompute`, as torchrun and srun
start it."""

import sys


def program() -> int:
    """The whole program; no Ctrl-C ends it in a traceback, however early."""
    try:
        from embed_precompute.cli.main import program
    except KeyboardInterrupt:  # the imports take a moment
        return 75
    return program()


if __name__ == "__main__":  # a worker process imports this module too
    sys.exit(program())
