"""What all tests share: no network, one thread, the `required` mark, real files where there are some, tiny corpora."""

import os
import signal

# Before anything imports torch or a hub client.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import hypothesis
import pytest
import torch
from pace import stretched

# Started in the background of a script, this process ignores Ctrl-C, and so would those that tests start and stop.
signal.signal(signal.SIGINT, signal.default_int_handler)
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported: without a GPU they are interpreted

if TYPE_CHECKING:
    from slurm_cluster import Cluster

    from jointfuse.data.shards import Corpus

SHARED = Path(__file__).resolve().parents[2] / "shared"

# The same examples on every machine, and no limit on the time of one: machines are busy.
hypothesis.settings.register_profile("repeatable", derandomize=True, deadline=None, max_examples=50)
hypothesis.settings.load_profile("repeatable")

# These begin, so that none of them runs alone at the end of several processes: files that wait for programs and files
# that compute, by turns.
LONGEST = ["slurm", "capacity", "fake_cuda", "readme", "pools", "interruption", "switches", "two_hosts"]
LONGEST += ["kernels_compile", "accumulation", "saves"]

_skipped: dict[str, str] = {}  # required tests that did not run, and why


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.hookimpl(wrapper=True, tryfirst=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """The time limit of a test, from pyproject.toml or a mark of its own, at the pace of this machine."""
    given, mark = item.config.getoption("timeout", None), item.get_closest_marker("timeout")
    limit = float(mark.args[0] if mark else item.config.getini("timeout") or 0)
    if given is None and limit:
        item.add_marker(pytest.mark.timeout(stretched(limit)), append=False)
    return (yield)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    if report.skipped and "required" in report.keywords:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        _skipped[report.nodeid] = reason.removeprefix("Skipped: ")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if _skipped and os.environ.get("CI"):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _skipped and os.environ.get("CI"):
        terminalreporter.section("required tests were skipped: with CI set that is a failure", red=True)
        for test, reason in _skipped.items():
            terminalreporter.line(f"{test}: {reason}")


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real data and small pretrained models, kept beside the repository's folder and never in it."""
    if not SHARED.is_dir():
        pytest.skip("there is no folder `shared` beside the repository: its data and pretrained models are needed here")
    return SHARED


@pytest.fixture(scope="session")
def uneven_corpus(tmp_path_factory: pytest.TempPathFactory) -> "Corpus":
    """Clips of 0.2 to 6 seconds, texts of 1 to 30 words, four speakers."""
    from helpers import build_corpus

    return build_corpus(tmp_path_factory.mktemp("uneven") / "corpus")


@pytest.fixture(scope="session")
def gapped_corpus(tmp_path_factory: pytest.TempPathFactory) -> "Corpus":
    """The same, but some utterances have no clip and some no text."""
    from helpers import build_corpus

    return build_corpus(tmp_path_factory.mktemp("gapped") / "corpus", gaps=("text", "clip"))


@pytest.fixture(scope="session")
def running_cluster() -> Iterator["Cluster"]:
    from slurm_cluster import slurm_cluster

    with slurm_cluster() as cluster:
        yield cluster


@pytest.fixture
def cluster(running_cluster: "Cluster") -> Iterator["Cluster"]:
    """A Slurm cluster of two nodes without jobs; the same one for all tests."""
    yield running_cluster
    running_cluster.clear()
