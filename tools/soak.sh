#!/usr/bin/env bash
# The long versions of loops of which the tests run a few rounds.
#   tools/soak.sh saves    50 runs killed while they save
set -euo pipefail
cd "$(dirname "$0")/.."
case "${1:-}" in
saves) SOAK_SAVES=${2:-50} .venv/bin/python -m pytest -q tests/test_saves.py ;;
*)
    sed -n '2,3s/^# //p' "$0" >&2
    exit 2
    ;;
esac
