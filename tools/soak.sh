#!/usr/bin/env bash
# The long versions of loops of which the tests run a few rounds.
#   tools/soak.sh saves    50 runs killed while they save
#   tools/soak.sh shards   20 builds stopped at random moments
#   tools/soak.sh files    2000 damages each of a corpus, a model and a run
#   tools/soak.sh plan     bytes of every kind of DeepSpeed file beside those of jointfuse plan
#   tools/soak.sh kernels  every kernel x precision x tile x width compiled for sm_80 and sm_90
set -euo pipefail
cd "$(dirname "$0")/.."
case "${1:-}" in
saves) SOAK_SAVES=${2:-50} .venv/bin/python -m pytest -q tests/test_saves.py ;;
shards) SOAK_SHARDS=${2:-20} .venv/bin/python -m pytest -q tests/test_build_table.py -k stopped_at_random ;;
files) SOAK_FILES=${2:-2000} .venv/bin/python -m pytest -q --timeout 7200 tests/test_fuzz_files.py ;;
plan) SOAK_PLAN=1 .venv/bin/python -m pytest -q tests/test_capacity.py ;;
kernels) SOAK_KERNELS=1 .venv/bin/python -m pytest -q tests/test_kernels_compile.py ;;
*)
    sed -n '2,7s/^# //p' "$0" >&2
    exit 2
    ;;
esac
