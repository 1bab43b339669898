"""`python -m embed_precompute` is the program `embed-precompute`, as torchrun and srun start it."""

import sys

if __name__ == "__main__":  # a worker process imports this module too
    try:
        from embed_precompute.cli.main import program
    except KeyboardInterrupt:  # the imports take a moment
        sys.exit(75)
    sys.exit(program())
