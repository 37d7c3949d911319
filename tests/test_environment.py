"""What the two commands of the README ask of a machine, before they install anything."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pace import stretched

PROJECT = Path(__file__).resolve().parents[1]


@pytest.mark.required
@pytest.mark.parametrize("script", ["quickstart.sh", "test.sh"])
def test_without_a_compiler_a_command_says_so_in_one_line_and_installs_nothing(script: str, tmp_path: Path) -> None:
    shutil.copytree(PROJECT / "tools", tmp_path / "tools")
    shutil.copy(PROJECT / "pyproject.toml", tmp_path)
    # No index: where the check is missing, the installation that follows fails at once.
    environment = os.environ | {"CXX": "no-such-compiler", "PYTHON": sys.executable, "PIP_NO_INDEX": "1"}
    done = subprocess.run(
        ["bash", f"tools/{script}"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=stretched(60),
        check=False,
    )
    assert done.returncode == 2
    assert done.stderr.startswith("error: a C++ compiler is needed")
    assert done.stderr.count("\n") == 1
    assert not done.stdout
    assert not (tmp_path / ".venv").exists()
