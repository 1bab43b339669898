#!/bin/bash
# `accelerate launch`: the same line on each node.   MACHINE_RANK=0 scripts/recipes/accelerate.sh
# Edit the lines marked 1, 2 and 3. It wants no `accelerate config`: all that matters is said here.
#
# Safe for the output: a real file system that all nodes mount. Not safe: a bucket. See
# docs/clusters.md.
set -u

# 1. How many nodes, how many GPUs on each, and the address of the first node.
nodes=2 gpus=8 head=node-1
# 2. Where embed-precompute is installed, on a file system that all nodes see.
source "$HOME/venv/bin/activate"
# 3. What to encode, and where to.
config=configs/opensora_v2.yaml captions=/data/captions output=/data/embeddings

# accelerate starts torchrun's agent, with its store and its restarts. Its options for mixed precision
# and compilation are for trainings: a configuration of ours says both for each encoder.
accelerate launch --multi_gpu --num_machines "$nodes" --machine_rank "${MACHINE_RANK:-0}" \
    --num_processes $((nodes * gpus)) --main_process_ip "$head" --main_process_port 29500 \
    --rdzv_backend c10d --max_restarts 3 --mixed_precision no --dynamo_backend no \
    -m embed_precompute run "$config" --captions.path "$captions" --output.path "$output"
embed-precompute status "$output" # the launcher's own code is always 1
