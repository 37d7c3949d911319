import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from distributed import run_program
from helpers import planned_epoch, reader_of
from training_fixtures import corpus, damage_a_clip, recipe

from jointfuse import launch
from jointfuse.config import load_config
from jointfuse.data.plan import Plan, micro_batches
from jointfuse.data.shards import Corpus

__all__ = ["corpus", "recipe"]

pytestmark = pytest.mark.required
SCRIPTS = Path(sys.executable).parent
# As in a shell in which the virtual environment is not active.
BARE = {"PATH": "/usr/local/bin:/usr/bin:/bin"}
STEPS = 12
SETTINGS = (f"train.steps={STEPS}", "train.batch=6", "data.workers=1", "train.log_every=10")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("launched") / "run"


def in_shared_memory() -> set[str]:
    return {path.name for path in Path("/dev/shm").glob("deepspeed*")}


def test_the_command_trains_on_two_ranks_and_only_the_first_one_speaks(recipe: Path, run: Path) -> None:
    before = in_shared_memory()
    command = [str(SCRIPTS / "jointfuse"), "train", "--recipe", str(recipe), "--run", str(run), "--ranks", "2"]
    ended = run_program([*command, *SETTINGS], environment=BARE)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    assert not re.search(r"[\r\x1b]", ended.stdout), "plain lines where there is no terminal"
    settings = load_config(str(recipe), SETTINGS).to_yaml()
    assert ended.stdout.startswith(settings)
    said = [line for line in ended.stdout[len(settings) :].splitlines() if line]
    figures = r"loss \d+\.\d{4}  \d+\.\d utterances/s  \d+\.\d GiB  ETA \d:\d\d:\d\d"
    score = r"weighted F1 0\.\d{4}, accuracy \d\.\d{4}, macro F1 0\.\d{4}  \(chosen so far\)"
    expected = [
        r"tiny: 43 utterances of tones, .* batch 6 = 2 ranks x 1 accumulated x 3, zero2 on cpu",
        "contrastive loss: backend tiled on cpu",
        f"step 8/{STEPS}  epoch 1  {figures}",
        f"step 10/{STEPS}  epoch 2  {figures}",
        f"step {STEPS}/{STEPS}  epoch 2  {figures}",
        f"dev at step {STEPS}: {score}",
        rf"finished at step {STEPS}; chosen: step {STEPS}, dev weighted F1 0\.\d{{4}}: {re.escape(str(run / 'best'))}",
    ]
    assert len(said) == len(expected), said
    for line, pattern in zip(said, expected, strict=True):
        assert re.fullmatch(pattern, line), line
    made = {path.name for path in run.iterdir()}
    assert made >= {"best", "checkpoints", "config.yaml", "environment.json", "metrics.jsonl", "status", "tokenizer"}
    assert json.loads((run / "environment.json").read_text(encoding="utf-8"))["ranks"] == 2
    assert in_shared_memory() == before, "what a run leaves there is lost to the machine until it starts anew"


def test_the_command_evaluates_that_run_on_two_ranks(run: Path) -> None:
    command = [str(SCRIPTS / "jointfuse"), "eval", str(run), "--split", "test", "--ranks", "2", "data.workers=0"]
    ended = run_program(command, environment=BARE)
    assert ended.returncode == 0, ended.stderr
    assert ended.stderr == ""
    assert not re.search(r"[\r\x1b]", ended.stdout)
    assert ended.stdout.count("13 samples") == 1
    assert ended.stdout.splitlines()[-1] == f"report: {run / 'eval-test' / 'report.html'}"
    metrics = json.loads((run / "eval-test" / "metrics.json").read_text(encoding="utf-8"))
    assert f"{100 * metrics['weighted_f1']:.2f}" in ended.stdout


def test_a_rank_that_fails_alone_ends_the_job_with_its_line(recipe: Path, corpus: Path, tmp_path: Path) -> None:
    copied = Path(shutil.copytree(corpus, tmp_path / "copied"))
    positions = reader_of(Corpus.open(corpus), "audio").positions((16, 16))
    third_batch = planned_epoch(Plan(positions, 6, seed=0), 0)[0][2]
    key = damage_a_clip(copied, int(micro_batches(third_batch, 2, 1, 1)[0, -1]))
    command = [str(SCRIPTS / "jointfuse"), "train", "--recipe", str(recipe), "--run", str(tmp_path / "run")]
    ended = run_program([*command, "--ranks", "2", f"data.corpus={copied}", "data.workers=1"], environment=BARE)
    assert ended.returncode == 2, ended.stdout
    assert re.fullmatch(rf"error: rank 1: .*{key} at byte \d+ cannot be read \(.*\); .*\n", ended.stderr), ended.stderr
    assert (tmp_path / "run" / "status").read_text() == "running\n"


# ------------------------------------------------------------------------- endings that DeepSpeed's launcher blurs


def fake_launcher(folder: Path, status: int) -> str:
    (folder / "bin").mkdir()
    (folder / "bin" / "deepspeed").write_text(f"import sys\nsys.exit({status})\n", encoding="utf-8")
    return str(folder / "bin" / "python")


@pytest.mark.parametrize(
    ("status", "returned", "says"),
    [
        (0, 1, "error: .*: the launcher was killed before the run ended; go on with --resume\n"),
        (247, 247, r"error: a rank of jointfuse.train was killed \(exit status 247\); if memory ran out, .*\n"),
        (2, 2, ""),
        (1, 1, ""),
    ],
)
def test_no_ending_is_silent_and_none_but_success_is_0(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    status: int,
    returned: int,
    says: str,
) -> None:
    real = sys.executable
    fake = fake_launcher(tmp_path, status)
    Path(fake).symlink_to(real)
    monkeypatch.setattr(sys, "executable", fake)
    assert launch.launch_training("demo", [], tmp_path / "run", resume=False, ranks=1) == returned
    assert re.fullmatch(says, capsys.readouterr().err)
