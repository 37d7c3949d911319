# Sourced by quickstart.sh and test.sh: makes .venv in the project's folder if it is not there, installs, reuses it.
# Usage: . tools/environment.sh EXTRA      (an extra of pyproject.toml)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() {
    echo "error: $1" >&2
    exit 2
}

python=${PYTHON:-}
if [ -z "$python" ]; then
    for candidate in python3.11 python3.12 python3.13 python3; do
        if "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            python=$candidate
            break
        fi
    done
fi
[ -n "$python" ] || fail "Python 3.11 or newer was not found; install it, or name it: PYTHON=/path/to/python3.11 bash $0"
# DeepSpeed compiles C++ on first use; without a compiler it would fail after everything is installed.
command -v "${CXX:-g++}" >/dev/null 2>&1 ||
    fail "a C++ compiler is needed (DeepSpeed builds extensions with it) and '${CXX:-g++}' was not found; install g++ (Debian: apt install g++) or set CXX"

wanted=$(cat pyproject.toml <(echo "$1") | cksum)
if [ "$(cat .venv/installed-"$1" 2>/dev/null)" != "$wanted" ]; then
    [ -x .venv/bin/python ] || "$python" -m venv .venv || fail "python could not make .venv (Debian: apt install python3-venv)"
    echo "installing into .venv (about 6 GB; minutes on a fast line) ..."
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -e ".[$1]" ||
        fail "pip could not install the dependencies, see above"
    echo "$wanted" >.venv/installed-"$1"
fi
export PATH="$PWD/.venv/bin:$PATH"
