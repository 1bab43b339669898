"""What a forked process finds imported."""

from __future__ import annotations

import threading

import handmade
import torch.distributed
import tqdm
import transformers.models.clip.modeling_clip
import transformers.models.t5.modeling_t5

import embed_precompute.audit.info
import embed_precompute.audit.verify
import embed_precompute.cli.main
import embed_precompute.job.run
import embed_precompute.train.dataset

# tqdm's default lock is a semaphore, which a killed process would leave behind.
tqdm.tqdm.set_lock(threading.RLock())

__all__ = ["embed_precompute", "handmade", "torch", "transformers"]
