#!/usr/bin/env bash
# All tests, with lint and types. Arguments go to pytest: bash tools/test.sh -k plan
. "$(dirname "${BASH_SOURCE[0]}")/environment.sh" test

ruff check .
ruff format --check .
mypy
# Two processes at most: each of them starts up to four ranks.
python -m pytest -n 2 --dist loadfile "$@"
