"""A run whose files are damaged goes on from what is whole, and says so."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from damaged import flip, write_run
from distributed import run_ranks
from training_fixtures import RECIPE, corpus, die_after, largest_difference, outcome, recipe, train, trainer

from jointfuse.config import load_config, validate
from jointfuse.data.shards import Corpus
from jointfuse.data.tokenizer import train_tokenizer
from jointfuse.errors import UserError
from jointfuse.evaluate.history import read_metrics
from jointfuse.files import former, replace_folder
from jointfuse.launch import check_train
from jointfuse.model.export import load_model, save_model
from jointfuse.model.network import Network
from jointfuse.train.run_folder import check_run_folder
from jointfuse.train.whole import latest_checkpoint

__all__ = ["corpus", "recipe"]

pytestmark = pytest.mark.required
SETTINGS = ("train.steps=6", "train.save_every=1 step", "train.deepspeed=zero1", "train.choose_by=last")


# ----------------------------------------------------------------------------------------------------- real checkpoints


def damaged_and_resumed(recipe: Path, corpus: Path, folder: Path) -> dict[str, Any]:
    """On each rank: a run whose newest checkpoint has a flipped bit in a tensor, resumed without its config.yaml; and
    what is said of a tar with another text."""
    import torch.distributed as dist

    from jointfuse.train.intact import check_data

    straight = train(recipe, folder / "straight", *SETTINGS)
    run = folder / "again"
    train(recipe, run, *SETTINGS, "train.keep_checkpoints=2", stop_after=4)
    held = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    if dist.get_rank() == 0:
        state = run / "checkpoints" / held[-1] / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
        flip(state, state.stat().st_size // 2)
        (run / "config.yaml").unlink()
    dist.barrier()
    with trainer(recipe, run, *SETTINGS, "train.keep_checkpoints=1", resume=True) as made:
        said = (made.damaged, made.position.step)
        die_after(made, None)
        made.train()
        resumed = outcome(made)
    left = sorted(path.name for path in (run / "checkpoints").glob("step-*"))
    changed = Corpus.open(folder / "changed")
    check_data(changed, ("train", "dev"), hashes=False)
    with pytest.raises(UserError) as refused:
        check_data(changed, ("train", "dev"), hashes=True)
    with pytest.raises(UserError) as asked, trainer(recipe, folder / "new", *SETTINGS, *on(folder / "changed")):
        raise AssertionError("it should have been refused")
    return {
        "straight": straight,
        "resumed": resumed,
        "held": held,
        "left": left,
        "said": said,
        "refused": (str(refused.value), str(asked.value), (folder / "new").exists()),
    }


def on(corpus: Path) -> tuple[str, str]:
    return f"data.corpus={corpus}", "data.verify=true"


@pytest.fixture(scope="module")
def ranks(recipe: Path, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    folder = tmp_path_factory.mktemp("damaged")
    tar = Path(shutil.copytree(corpus, folder / "changed")) / "dev" / "shard-000000.tar"
    data = tar.read_bytes()
    for old, new in ((b"what a day", b"what a dog"), (b"all is well", b"all is evil")):
        data = data.replace(old, new)
    assert data != tar.read_bytes()
    tar.write_bytes(data)
    return folder, run_ranks(2, damaged_and_resumed, folder / "ranks", recipe, corpus, folder)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_goes_on(ranks: Any) -> None:
    folder, (first, other) = ranks
    assert first["held"] == ["step-00000003", "step-00000004"]
    state = folder / "again" / "checkpoints" / "step-00000004" / "zero_pp_rank_1_mp_rank_00_optim_states.pt"
    assert first["said"] == other["said"] == ([f"{state}: damaged, changed since it was written"], 3)
    log = (folder / "ranks" / "rank0.log").read_text(encoding="utf-8")
    assert f"{state}: damaged, changed since it was written; the newest checkpoint that is whole is of step 3\n" in log
    assert np.array_equal(first["resumed"].losses, first["straight"].losses)
    assert largest_difference(first["resumed"].weights, first["straight"].weights) == 0
    assert first["left"] == ["step-00000006"], "those of the first life are gone"
    assert (folder / "again" / "config.yaml").exists()


def test_a_changed_text_in_a_tar_is_found_by_all_ranks_when_hashes_are_compared(ranks: Any) -> None:
    folder, answers = ranks
    for refused, asked, exists in (answer["refused"] for answer in answers):
        assert refused == asked == answers[0]["refused"][0]
        assert (
            f"{folder / 'changed' / 'dev' / 'shard-000000.tar'}: changed since the corpus was built (SHA-256 " in asked
        )
        assert not exists
    assert "comparing hashes: " in (folder / "ranks" / "rank0.log").read_text(encoding="utf-8")


# -------------------------------------------------------------------------------------------------------- as if trained


@pytest.fixture
def run(corpus: Path, tmp_path: Path) -> Path:
    write_run(tmp_path / "run", validate(RECIPE, "here"), corpus, (1, 2))
    return tmp_path / "run"


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-30])


def renamed_entry(path: Path) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | {"epochs": 1}))


@pytest.mark.parametrize(
    ("file", "damage"),
    [
        ("position.json", cut),
        ("position.json", renamed_entry),
        ("position.json", Path.unlink),
        ("config.yaml", Path.unlink),
        ("mp_rank_00_model_states.pt", cut),
        ("zero_pp_rank_1_mp_rank_00_optim_states.pt", Path.unlink),
        ("../latest", cut),
        ("../latest", Path.unlink),
    ],
)
def test_a_run_goes_on_from_the_newest_checkpoint_that_is_whole(
    run: Path, file: str, damage: Callable[[Path], None]
) -> None:
    damage(run / "checkpoints" / "step-00000002" / file)
    expected = "step-00000002" if "latest" in file else "step-00000001"
    assert latest_checkpoint(run) == run / "checkpoints" / expected


def test_latest_may_name_an_older_one(run: Path) -> None:
    (run / "checkpoints" / "latest").write_text("step-00000001\n")
    assert latest_checkpoint(run) == run / "checkpoints" / "step-00000001"


def test_where_no_checkpoint_is_whole_the_first_fault_and_a_way_out_are_said(run: Path) -> None:
    for step in (1, 2):
        (run / "checkpoints" / f"step-0000000{step}" / "position.json").unlink()
    with pytest.raises(UserError) as caught:
        latest_checkpoint(run)
    first = run / "checkpoints" / "step-00000002" / "position.json"
    assert str(caught.value).startswith(f"{first}: cannot be read (No such file or directory): no whole checkpoint is")
    assert f"train.init_from={run / 'best'}" in str(caught.value)


def test_a_folder_with_leftovers_and_no_run_leads_to_another_folder(run: Path, tmp_path: Path) -> None:
    (run / "config.yaml").unlink()
    check_run_folder(run, resume=True)
    with pytest.raises(UserError, match="add --resume to go on with it"):
        check_run_folder(run, resume=False)
    shutil.rmtree(run / "checkpoints")
    for resume in (True, False):
        with pytest.raises(UserError, match="choose another folder"):
            check_run_folder(run, resume)


def test_a_line_cut_off_at_the_end_of_the_log_is_left_out_and_another_one_named(run: Path) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "tr')
    assert [row["step"] for row in read_metrics(run)] == [1, 2]
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 3}\n')
    with pytest.raises(UserError, match=r"metrics\.jsonl: line 3 is damaged \(Invalid JSON.*\); delete that line"):
        read_metrics(run)


def test_the_index_of_dev_is_looked_at_before_a_training_starts(recipe: Path, corpus: Path, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(corpus, tmp_path / "corpus"))
    cut(copy / "dev" / "index.bin")
    with pytest.raises(UserError, match=r"dev/index\.bin: the index is empty or cut off within an entry"):
        check_train(load_config(str(recipe), [f"data.corpus={copy}"]), tmp_path / "run", False, 1)


# --------------------------------------------------------------------------------------------------------------- models


@pytest.fixture
def model(corpus: Path, tmp_path: Path) -> Path:
    config, tokenizer = validate(RECIPE, "here"), train_tokenizer(Corpus.open(corpus).split("dev"), 300)
    data = config.data
    network = Network(config.model, 4, data.max_tokens, data.max_seconds, tokenizer_size=len(tokenizer))
    save_model(tmp_path / "best", network.state_dict(), network, config, [*"abcd"], (0.0, 1.0), tokenizer, {})
    return tmp_path / "best"


def another_mean(path: Path) -> None:
    content = json.loads(path.read_text())
    content["mel"]["mean"] += 1
    path.write_text(json.dumps(content))


@pytest.mark.parametrize(
    ("file", "damage", "says"),
    [
        ("model.safetensors", lambda path: flip(path, -1), "model.safetensors: damaged, changed since"),
        ("model.json", another_mean, "model.json: damaged, changed since the model was exported"),
        ("model.json", cut, "model.json: Invalid JSON"),
        ("tokenizer", shutil.rmtree, "tokenizer: missing"),
        ("tokenizer/tokenizer.json", cut, "tokenizer: damaged ("),
    ],
)
def test_a_damaged_model_is_named(model: Path, file: str, damage: Callable[[Path], None], says: str) -> None:
    load_model(model)
    damage(model / file)
    with pytest.raises(UserError) as caught:
        load_model(model)
    assert f"{model / says}" in str(caught.value)
    assert str(caught.value).endswith("; copy the folder again or export the model again")


def test_a_model_without_digests_is_read_as_before(model: Path) -> None:
    content = json.loads((model / "model.json").read_text())
    del content["digests"]
    (model / "model.json").write_text(json.dumps(content))
    load_model(model)


def test_a_model_that_is_replaced_while_it_is_read_is_read_again(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from jointfuse.model import export

    better = Path(shutil.copytree(model, model.with_name("better")))
    state = export.load_file(better / "model.safetensors")
    export.save_file({name: tensor + 1 for name, tensor in state.items()}, better / "model.safetensors")
    content = json.loads((better / "model.json").read_text())
    content["digests"] = export._digests(content, better)
    (better / "model.json").write_text(json.dumps(content | {"info": {"step": 2}}))
    read = export._read_description

    def read_and_replace(folder: Path) -> dict[str, Any]:
        description = read(folder)
        if better.exists():
            replace_folder(better, model)
        return description

    monkeypatch.setattr(export, "_read_description", read_and_replace)
    loaded = load_model(model)
    assert loaded.info == {"step": 2}
    assert all(torch.equal(tensor, state[name] + 1) for name, tensor in loaded.network.state_dict().items())


def test_a_model_is_read_in_the_instant_in_which_another_takes_its_place(model: Path) -> None:
    model.rename(former(model))
    load_model(model)
