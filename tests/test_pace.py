"""Time limits follow the speed of the machine."""

import shutil
import sys
from pathlib import Path

import pace
import pytest
from distributed import run_program
from pace import MOST, OFTEN, REFERENCE, slowness, stretched

CASES = """
import time
import pytest

def test_under_the_general_limit():
    time.sleep(1)

@pytest.mark.timeout(0.3)
def test_under_a_limit_of_its_own():
    time.sleep(1)
"""


class Clock:
    """time.monotonic, moved by `work` as far as a machine so much slower takes for it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.times, self.worked = 0.0, 1.0, 0
        monkeypatch.setattr(pace, "_measured", [])
        monkeypatch.setattr(pace, "time", self)
        monkeypatch.setattr(pace, "work", self.work)

    def monotonic(self) -> float:
        return self.now

    def work(self) -> None:
        self.worked += 1
        self.now += self.times * REFERENCE


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


@pytest.mark.parametrize(("times", "expected"), [(0.4, 1.0), (1.0, 1.0), (3.5, 3.5), (1000.0, MOST)])
def test_a_limit_is_as_many_times_longer_as_the_machine_is_slower(times: float, expected: float, clock: Clock) -> None:
    clock.times = times
    assert stretched(60) == pytest.approx(60 * expected)


def test_the_pace_is_measured_anew_when_the_last_measurement_is_old(clock: Clock) -> None:
    assert slowness() == pytest.approx(1)
    clock.times = 4.0
    assert slowness() == pytest.approx(1)
    assert clock.worked == 1
    clock.now += OFTEN
    assert slowness() == pytest.approx(4)
    assert clock.worked == 2


@pytest.mark.parametrize("slow", [True, False])
def test_the_limits_of_tests_are_stretched(slow: bool, tmp_path: Path) -> None:
    for name in ("conftest.py", "pace.py"):
        shutil.copy(Path(__file__).with_name(name), tmp_path)
    with (tmp_path / "pace.py").open("a", encoding="utf-8") as file:
        file.write(f"\nREFERENCE = {1e-9 if slow else 1e9}\n")
    (tmp_path / "pytest.ini").write_text(
        "[pytest]\ntimeout = 0.4\ntimeout_method = signal\nmarkers =\n    required: x\n"
    )
    (tmp_path / "test_cases.py").write_text(CASES)
    where = ["--rootdir", str(tmp_path), str(tmp_path)]
    ended = run_program([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *where])
    assert ("2 passed" in ended.stdout) == slow, ended.stdout
    assert ("2 failed" in ended.stdout) == (not slow), ended.stdout
