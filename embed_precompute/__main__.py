"""`python -m embed_precompute` is the program `embed-precompute`, as torchrun and srun start it."""

import sys

from embed_precompute.cli.main import main

sys.exit(main())
