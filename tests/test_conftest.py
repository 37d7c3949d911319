import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from pace import stretched

CASES = """
import pytest

@pytest.mark.required
def test_that_must_run():
    pytest.skip("no data here")

def test_that_may_be_skipped():
    pytest.skip("never mind")

def test_that_runs():
    pass
"""


@pytest.mark.parametrize(("ci", "status"), [("true", 1), ("", 0)])
def test_a_skipped_required_test_fails_the_session_in_ci_and_is_named(ci: str, status: int, tmp_path: Path) -> None:
    for name in ("conftest.py", "pace.py"):
        shutil.copy(Path(__file__).with_name(name), tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n    required: must run\n")
    (tmp_path / "test_cases.py").write_text(CASES)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--rootdir", tmp_path, tmp_path],
        env=os.environ | {"CI": ci},
        capture_output=True,
        text=True,
        timeout=stretched(120),
    )
    assert done.returncode == status, done.stdout
    assert ("test_cases.py::test_that_must_run: no data here" in done.stdout) == bool(ci)
    assert "test_that_may_be_skipped:" not in done.stdout
    assert "1 passed, 2 skipped" in done.stdout
