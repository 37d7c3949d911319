#!/usr/bin/env bash
# All tests, with lint and types. Arguments go to pytest: bash tools/test.sh -k plan
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh" test

ruff check .
ruff format --check .
mypy
# Three at a time, a file each; many of them start up to four ranks, and many wait for what they started.
python -m pytest -n 3 --dist loadfile --no-loadscope-reorder "$@"
