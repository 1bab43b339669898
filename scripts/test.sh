#!/usr/bin/env bash
# Set up a virtual environment and run all checks: lint, format, types, layers, docs, tests.
#
#   scripts/test.sh [VENV]                      the current stack (default .venv-test)
#   STACK=colossalai scripts/test.sh [VENV]     torch 2.5.1 with transformers 4.51.3, which ColossalAI
#                                               0.5.0 pins, and ColossalAI itself: tests only, those
#                                               of Shardformer too (default .venv-colossalai)
#
# PYTHON=python3.12   another interpreter        TORCH_SPEC=torch==2.13.0   the current stack's torch
# PYTEST_ARGS="-x -k store"   passed to pytest       TEST_WORKERS=2   its processes (0: in one)
set -euo pipefail
cd "$(dirname "$0")/.."

stack=${STACK:-current}
case $stack in
    current)
        venv=${1:-.venv-test}
        pins=("${TORCH_SPEC:-torch==2.13.0}")
        extras=dev,docs
        ;;
    colossalai)
        venv=${1:-.venv-colossalai}
        pins=(torch==2.5.1 transformers==4.51.3)
        extras=colossalai,dev
        ;;
    *)
        echo "STACK is '$stack': expected current or colossalai." >&2
        exit 2
        ;;
esac
step() { printf '\n== %s (%d s)\n' "$*" "$SECONDS"; }

step "virtual environment $venv ($stack)"
[ -x "$venv/bin/python" ] || "${PYTHON:-python3}" -m venv "$venv"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check "${pins[@]}" --editable ".[$extras]"
bin=$(cd "$venv/bin" && pwd)
export PATH="$bin:$PATH" TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
python -c 'import torch, transformers; print("torch", torch.__version__, "transformers", transformers.__version__)'
if [ "$stack" = colossalai ]; then  # without it the tests of Shardformer would be skipped
    python -W ignore -c 'import colossalai; print("colossalai", colossalai.__version__)'
fi

if [ "$stack" = current ]; then
    step "ruff check"
    ruff check .
    step "ruff format --check"
    ruff format --check .
    step "mypy --strict"
    mypy
    step "lint-imports"
    lint-imports
    step "docs, to site/"
    if [ -x "$bin/zensical" ]; then
        zensical build --strict -f mkdocs.yml
    else
        echo "NOT BUILT: the docs' builder needs Python 3.11." >&2
    fi
fi
step "pytest"
# shellcheck disable=SC2086  # PYTEST_ARGS is a list of words
python -m pytest -n "${TEST_WORKERS:-2}" --dist worksteal ${PYTEST_ARGS:-}
step "all checks passed ($stack)"
