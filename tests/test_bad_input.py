import json
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
import yaml
from corpus_helpers import hashes
from distributed import run_program, run_ranks
from training_fixtures import RECIPE, corpus, make_corpus, recipe, train, trainer

from jointfuse import cli, launch
from jointfuse.config import load_config
from jointfuse.data.shards import Corpus
from jointfuse.errors import UserError

__all__ = ["corpus", "recipe"]

pytestmark = pytest.mark.required
Refused = Callable[..., str]


@pytest.fixture
def refused(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Refused:
    """Runs `jointfuse ARGUMENTS`: exit status 2 and one line, which is returned, before any rank is started."""

    def never(*arguments: object) -> int:
        raise AssertionError("ranks were started")

    monkeypatch.setattr(launch, "launch", never)

    def run(*arguments: object) -> str:
        monkeypatch.setattr(sys, "argv", ["jointfuse", *map(str, arguments)])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            cli.main()
        printed = capsys.readouterr()
        assert ended.value.code == 2
        assert printed.out == ""
        return the_line(printed.err)

    return run


def the_line(errors: str) -> str:
    """What the only line says after `error: `."""
    lines = errors.splitlines()
    assert len(lines) == 1, errors
    assert lines[0].startswith("error: ")
    return lines[0].removeprefix("error: ")


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "new"


@pytest.fixture
def copied(corpus: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(corpus, tmp_path / "copied"))


# ------------------------------------------------------------------------------------------------------------ settings


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("train.learning_rate=1e-4", "unknown setting 'train.learning_rate', did you mean"),
        ("trian.lr=1e-4", "unknown setting 'trian', did you mean 'train'?"),
        ("train.lr", "override 'train.lr': write section.key=value"),
        ("train.lr=fast", "train.lr = 'fast'"),
        ("train.lr=-1", "train.lr = -1: should be greater than 0"),
        ("train.lr=.nan", "train.lr = nan"),
        ("loss.temperature=0", "loss.temperature = 0: should be greater than 0"),
        ("loss.temperature=-0.1", "loss.temperature = -0.1: should be greater than 0"),
        ("train.epochs=0", "train.epochs = 0"),
        ("train.save_every=often", "train.save_every = 'often': write a number and a unit"),
        ("train.freeze=[everything]", "train.freeze"),
        ("train.batch=7", "train.batch = 7 cannot be divided over 2 ranks"),
        ("train.micro_batch=4", "train.micro_batch 4 does not divide train.batch 6"),
        ("train.micro_batch=2", "train.micro_batch = 2: each of 2 ranks holds 3 utterances"),
        ("train.deepspeed=zero4", "train.deepspeed = 'zero4': choose one of"),
        ("train.deepspeed=nowhere.json", "nowhere.json: cannot be read (No such file or directory); train.deepspeed"),
        ("data.corpus=nowhere", "nowhere: no such folder"),
        ("data.corpus=", "data.corpus"),
    ],
)
def test_a_wrong_setting_is_named(refused: Refused, recipe: Path, run: Path, override: str, says: str) -> None:
    assert says in refused("train", "--recipe", recipe, "--run", run, "--ranks", 2, override)
    assert not run.parent.exists()


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_a_precision_that_the_device_cannot_have_is_named(
    refused: Refused, recipe: Path, run: Path, monkeypatch: pytest.MonkeyPatch, precision: str
) -> None:
    from deepspeed.accelerator import get_accelerator

    name = f"is_{precision}_supported"  # which CPU knows fp16 is not the same everywhere
    monkeypatch.setattr(get_accelerator(), name, lambda: False)
    assert f"train.deepspeed = 'zero2_{precision}': this machine's device (cpu) cannot train in {precision}" in refused(
        "train", "--recipe", recipe, "--run", run, f"train.deepspeed=zero2_{precision}"
    )
    assert not run.parent.exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("train: [1, 2", "not valid YAML"),
        ("- 1\n- 2\n", "a recipe has the sections"),
        ("model: {modality: both}\ntrain: {epochs: 1}\n", "model.text_encoder"),
        (yaml.safe_dump(RECIPE | {"loss": {"temprature": 1}}), "unknown setting 'loss.temprature', did you mean"),
    ],
)
def test_a_wrong_recipe_is_named(refused: Refused, run: Path, tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(content, encoding="utf-8")
    line = refused("train", "--recipe", path, "--run", run)
    assert says in line
    assert "mine.yaml" in line
    assert "there is no recipe 'dmeo', did you mean 'demo'?" in refused("train", "--recipe", "dmeo", "--run", run)
    assert not run.parent.exists()


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "Invalid JSON"),
        ('{"zero_optimization": {"stage": "two"}}', "zero_optimization.stage: Input should be 0, 1, 2 or 3"),
        ('{"fp16": true}', "fp16: Input should be"),
        ('{"bf16": {"enabled": "yes"}}', "bf16.enabled: Input should be a valid boolean"),
        ('{"bf16": {"enabled": true}, "fp16": {"enabled": true}}', "fp16 and bf16 are both enabled"),
        ('{"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}}', "zero_optimization.offload_optimizer: "),
        ('{"zero_optimization": {"offload_optimizer": {"device": "disk"}}}', "offload_optimizer.device: Input should"),
        ('{"zero_optimization": {"cpu_offload": true}}', "'cpu_offload' is an old name; write offload_optimizer"),
        ('{"zero_optimization": {"reduce_bucket_size": "auto"}}', "zero_optimization.reduce_bucket_size: Input"),
        ("[1]", "Input should be an object"),
        ('{"train_batch_size": 8}', "'train_batch_size' belongs to the recipe (train.batch)"),
        ('{"optimizer": {"type": "Adam"}}', "'optimizer' belongs to the recipe"),
    ],
)
def test_a_deepspeed_file_that_cannot_be_used_is_named(
    refused: Refused, recipe: Path, run: Path, tmp_path: Path, content: str, says: str
) -> None:
    path = tmp_path / "mine.json"
    path.write_text(content, encoding="utf-8")
    line = refused("train", "--recipe", recipe, "--run", run, f"train.deepspeed={path}")
    assert says in line
    assert "mine.json" in line
    assert not run.parent.exists()


# -------------------------------------------------------------------------------------------------------------- corpus


def test_a_truncated_tar_is_named_before_training(refused: Refused, recipe: Path, run: Path, copied: Path) -> None:
    tar = copied / "train" / "shard-000001.tar"
    tar.write_bytes(tar.read_bytes()[:-2048])
    line = refused("train", "--recipe", recipe, "--run", run, f"data.corpus={copied}")
    assert str(tar) in line
    assert "truncated or replaced" in line
    assert not run.parent.exists()


@pytest.mark.parametrize("split", ["dev", "train"])
def test_a_missing_split_is_named(refused: Refused, recipe: Path, run: Path, copied: Path, split: str) -> None:
    info = json.loads((copied / "corpus.json").read_text(encoding="utf-8"))
    del info["splits"][split]
    (copied / "corpus.json").write_text(json.dumps(info), encoding="utf-8")
    assert f"no split '{split}'" in refused("train", "--recipe", recipe, "--run", run, f"data.corpus={copied}")
    assert not run.parent.exists()


def test_a_comparison_without_a_test_split_is_refused_before_training(
    refused: Refused, recipe: Path, run: Path, copied: Path
) -> None:
    info = json.loads((copied / "corpus.json").read_text(encoding="utf-8"))
    del info["splits"]["test"]
    (copied / "corpus.json").write_text(json.dumps(info), encoding="utf-8")
    assert "no split 'test'" in refused("compare", "--recipe", recipe, "--out", run, f"data.corpus={copied}")
    assert not run.parent.exists()


def test_a_corpus_that_was_never_finished_is_named(refused: Refused, recipe: Path, run: Path, copied: Path) -> None:
    (copied / "corpus.json").unlink()
    assert "no corpus.json" in refused("train", "--recipe", recipe, "--run", run, f"data.corpus={copied}")
    assert not run.parent.exists()


# --------------------------------------------------------------------------------------------------------- run folders


@pytest.fixture
def stopped(recipe: Path, corpus: Path, run: Path) -> Path:
    """A run of two ranks that has a checkpoint, as far as anything reads before DeepSpeed does."""
    from jointfuse.data.mixture import corpus_digest
    from jointfuse.train.deepspeed_file import read_deepspeed_file
    from jointfuse.train.engine import layout
    from jointfuse.train.resize import state_files
    from jointfuse.train.whole import Position

    config = load_config(str(recipe))
    written = asdict(layout(read_deepspeed_file(config.train), world_size=2))
    checkpoint = run / "checkpoints" / "step-00000005"
    checkpoint.mkdir(parents=True)
    position = Position(step=5, batch=5, corpus=corpus_digest(Corpus.open(corpus)), **written)
    for file in state_files(checkpoint, position.layout):
        torch.save({}, file)
    (checkpoint / "position.json").write_text(json.dumps(asdict(position)), encoding="utf-8")
    (checkpoint / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    (run / "checkpoints" / "latest").write_text("step-00000005\n", encoding="utf-8")
    (run / "config.yaml").write_text(config.to_yaml(), encoding="utf-8")
    return run


def test_a_run_that_exists_is_not_written_over(refused: Refused, recipe: Path, stopped: Path, tmp_path: Path) -> None:
    before = hashes(stopped)
    line = refused("train", "--recipe", recipe, "--run", stopped, "--ranks", 2)
    assert str(stopped) in line
    assert "--resume" in line
    other = tmp_path / "photographs"
    other.mkdir()
    (other / "me.jpeg").touch()
    assert "is not empty; choose another folder" in refused("train", "--recipe", recipe, "--run", other)
    assert "not" in refused("train", "--recipe", recipe, "--run", other / "me.jpeg")
    assert hashes(stopped) == before


@pytest.mark.parametrize(
    ("recipe", "arguments", "says"),
    [
        (
            "paper-large",
            ["--nodes", 3],
            "train.batch = 32 cannot be divided over 3 ranks; set train.batch=30",
        ),
        ("paper-lagre", [], "there is no recipe 'paper-lagre', did you mean 'paper-large'?"),
        (
            "paper-large",
            ["model.language.weights=nobody/knows"],
            "model.language.weights: the pretrained weights 'nobody/knows' cannot",
        ),
        (
            "paper-large",
            ["model.vision.weights=vit_of_nobody"],
            "model.vision.weights: the pretrained weights 'vit_of_nobody' cannot",
        ),
        ("paper-large", ["model.vision.weights=resnet18"], "'resnet18' is a ResNet that cannot serve"),
        ("paper-large", ["--counts", "12,none"], "--counts 12,none: write the utterances of each class"),
        ("paper-large", ["train.deepspeed=nowhere.json"], "nowhere.json: cannot be read"),
        ("paper-large", ["data.corpus=nowhere"], "nowhere: no such folder"),
    ],
)
def test_what_cannot_be_planned_is_said(refused: Refused, recipe: str, arguments: list[object], says: str) -> None:
    assert says in refused("plan", "--recipe", recipe, "--tflops", 1, "--bandwidth", 1, *arguments)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (
            ["--ranks", 2, "train.lr=2e-3"],
            "was written with other settings: train.lr = 0.001 there, 0.002 here; resume",
        ),
        (
            ["--ranks", 2, "model.blocks=1", "train.seed=3"],
            "other settings: model.blocks = 2 there, 1 here; train.seed = 0 there, 3 here; resume with the settings",
        ),
        (["--ranks", 2, "train.steps=19"], "train.steps = 20 there, 19 here, which may only grow; resume with"),
        (
            ["--ranks", 2, "train.epochs=9"],
            "train.epochs = None there, 9 here; train.steps = 20 there, None here, which",
        ),
        (["--ranks", 2, "train.choose_by=accuracy"], "train.choose_by = 'weighted_f1' there, 'accuracy' here; resume"),
        (["--ranks", 4], "train.batch = 6 cannot be divided over 4 ranks"),
        (
            ["--ranks", 3, "train.deepspeed=zero3_bf16"],
            "was written in float32, train.deepspeed = 'zero3_bf16' trains in bf16; choose a DeepSpeed file of that "
            "precision, such as zero2",
        ),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_by_all_that_differs(
    refused: Refused, recipe: Path, stopped: Path, arguments: list[object], says: str
) -> None:
    before = hashes(stopped)
    assert says in refused("train", "--recipe", recipe, "--run", stopped, "--resume", *arguments)
    assert hashes(stopped) == before


def test_a_checkpoint_of_another_corpus_is_refused(refused: Refused, recipe: Path, stopped: Path, copied: Path) -> None:
    info = json.loads((copied / "corpus.json").read_text(encoding="utf-8"))
    (copied / "corpus.json").write_text(json.dumps(info | {"description": "another"}), encoding="utf-8")
    before = hashes(stopped)
    line = refused("train", "--recipe", recipe, "--run", stopped, "--resume", "--ranks", 2, f"data.corpus={copied}")
    assert "another corpus" in line
    assert hashes(stopped) == before


def test_resuming_what_is_not_there_is_refused(refused: Refused, recipe: Path, run: Path, stopped: Path) -> None:
    line = refused("train", "--recipe", recipe, "--run", run.parent / "other", "--resume")
    assert "there is no run to resume here" in line
    shutil.rmtree(stopped / "checkpoints" / "step-00000005")
    line = refused("train", "--recipe", recipe, "--run", stopped, "--resume", "--ranks", 2)
    assert "names 'step-00000005', which is not there" in line


# ---------------------------------------------------------------------------------------------- what only ranks can see


def everything_wrong(recipe: Path, cases: dict[str, list[str]], folder: Path) -> dict[str, tuple[str, bool]]:
    """On each rank: what a Trainer says to each list of settings, and whether it made its folder."""
    import torch.distributed as dist

    answers = {}
    for name, settings in cases.items():
        run = folder / name
        try:
            with trainer(recipe, run, *settings):
                raise AssertionError(f"{name} was accepted")
        except UserError as error:
            answers[name] = (str(error), run.exists())
        dist.barrier()
    try:
        train(recipe, folder / "nan", "train.lr=1e30", "train.most_broken=0")
    except UserError as error:
        answers["nan"] = (str(error), False)
    return answers


@pytest.fixture(scope="module")
def answers(recipe: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, tuple[str, bool]]]:
    folder = tmp_path_factory.mktemp("wrong")
    gpt = folder / "gpt"
    gpt.mkdir()
    (gpt / "config.json").write_text('{"model_type": "gpt2", "architectures": ["GPT2Model"]}', encoding="utf-8")
    empty = folder / "empty"
    empty.mkdir()
    gapped = make_corpus(folder / "gapped", gaps=True)
    cases = {
        "cannot serve": [f"model.language.weights={gpt}"],
        "no such folder": [f"model.language.weights={folder / 'nowhere'}"],
        "not on this machine": ["model.text_encoder.weights=nobody/nothing"],
        "no vision weights": ["model.vision.weights=vit_nothing_patch16"],
        "too many blocks": ["model.blocks=9"],
        "all frozen": [
            "train.freeze=[text_encoder, extractor, language, vision_embed, vision_stem, vision, joint, heads, "
            "temperature]"
        ],
        "nothing to start from": [f"train.init_from={empty}"],
        "gaps": [f"data.corpus={gapped}"],
    }
    return run_ranks(2, everything_wrong, folder / "ranks", recipe, cases, folder)


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("cannot serve", "model.language.weights: a 'gpt2' encoder cannot serve here; choose one of the families"),
        ("no such folder", "model.language.weights: there is no folder"),
        (
            "not on this machine",
            "model.text_encoder.weights: the pretrained weights 'nobody/nothing' cannot be had here",
        ),
        ("no vision weights", "model.vision.weights: "),
        ("too many blocks", "model.language: 0 stem_layers and 9 blocks need 9 layers, it has 2"),
        ("all frozen", "train.freeze: every part is frozen, nothing is left to train"),
        ("nothing to start from", "no exported model here (model.json is missing)"),
        ("gaps", "utterances have no text (first: train_train0_000); set data.missing_modality=allow"),
    ],
)
def test_every_rank_says_the_same_line_and_nothing_is_written(
    answers: list[dict[str, tuple[str, bool]]], name: str, says: str
) -> None:
    for said, exists in (rank[name] for rank in answers):
        assert says in said
        assert "\n" not in said
        assert not exists


def test_a_loss_that_is_not_a_number_ends_the_run_on_every_rank(answers: list[dict[str, tuple[str, bool]]]) -> None:
    for rank in answers:
        assert rank["nan"][0].startswith("step 2: the loss or its gradient was not finite in a step; ")
        assert "; lower train.lr, or check the corpus with tools/verify_shards.py" in rank["nan"][0]


def test_a_program_whose_loss_is_not_a_number_ends_with_one_line_and_status_2(recipe: Path, run: Path) -> None:
    command = [sys.executable, "-m", "jointfuse.train", "--recipe", str(recipe), "--run", str(run)]
    command += ["train.lr=1e30", "train.most_broken=0"]
    ended = run_program(command)
    assert ended.returncode == 2, ended.stderr
    assert the_line(ended.stderr).startswith("step 2: ")
    assert "; lower train.lr" in the_line(ended.stderr)
    assert not (run / "best").exists()


# ----------------------------------------------------------------------------------------------------------- evaluation


def test_evaluating_what_is_not_there_is_refused(refused: Refused, stopped: Path, copied: Path) -> None:
    before = hashes(stopped)
    assert "no chosen model here (RUN/best is missing)" in refused("eval", stopped)
    assert "no chosen model here" in refused("eval", stopped.parent / "nowhere")
    assert hashes(stopped) == before
    (stopped / "best").mkdir()
    assert "model.json is missing" in refused("eval", stopped)
    (stopped / "best" / "model.json").write_text("{", encoding="utf-8")
    assert "best/model.json: Invalid JSON" in refused("eval", stopped)
