"""What a DeepSpeed file decides, and who hears of it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from test_config import SMALL

from jointfuse.capacity import plan as planning
from jointfuse.capacity.zero import zero_file
from jointfuse.config import load_config, recipe_names
from jointfuse.errors import UserError
from jointfuse.train.deepspeed_file import RECIPE_OWNS, DeepSpeedFile, read_deepspeed_file, slow_precision


@dataclass(frozen=True)
class Planned:
    assumptions: list[str]


SHIPPED = sorted(path.stem for path in (Path(__file__).parents[1] / "ds_configs").glob("*.json"))


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    path = tmp_path / "small.yaml"
    path.write_text(json.dumps(SMALL))
    return str(path)


def read(recipe: str, name: object) -> DeepSpeedFile:
    return read_deepspeed_file(load_config(recipe, [f"train.deepspeed={name}"]).train)


def written(folder: Path, content: Any) -> Path:
    path = folder / "mine.json"
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_file_is_what_its_name_says(name: str, recipe: str) -> None:
    file = read(recipe, name)
    assert file.stage == int(name.removeprefix("zero")[0])
    assert file.precision == (name.rpartition("_")[2] if name.endswith("16") else "float32")
    assert file.offload_optimizer == ("cpu" if "offload" in name else None)
    assert file.offload_param == ("cpu" if "offload" in name and file.stage == 3 else None)
    assert not file.content.keys() & RECIPE_OWNS.keys()
    assert file.float32_file == name.removesuffix("_bf16").removesuffix("_fp16")


@pytest.mark.parametrize("recipe_name", recipe_names())
def test_every_recipe_names_a_file_that_is_there(recipe_name: str) -> None:
    assert load_config(recipe_name).train.deepspeed in SHIPPED


def test_offload_to_no_device_is_no_offload_for_the_optimizer_and_for_the_plan(recipe: str, tmp_path: Path) -> None:
    from jointfuse.train.engine import choose_adam

    for device, offloads in (("none", None), ("cpu", "cpu"), ("nvme", "nvme")):
        zero = {"stage": 3, "offload_optimizer": {"device": device}, "offload_param": {"device": device}}
        file = read(recipe, written(tmp_path, {"zero_optimization": zero}))
        assert (file.offload_optimizer, file.offload_param) == (offloads, offloads)
        assert file.on_nvme == (device == "nvme")
        numbers = zero_file(file)
        assert (numbers.host_optimizer, numbers.host_weights) == (bool(offloads), bool(offloads))
        adam = choose_adam(file, decoupled=False)
        assert (adam.func.__name__ == "DeepSpeedCPUAdam") == bool(offloads)


def test_what_a_file_says_of_sizes_is_what_the_plan_counts(recipe: str, tmp_path: Path) -> None:
    plain = zero_file(read(recipe, written(tmp_path, {})))
    assert (plain.stage, plain.precision, plain.bucket, plain.buckets) == (0, "float32", 500_000_000, 1)
    content = {
        "zero_optimization": {"stage": 2, "overlap_comm": True, "reduce_bucket_size": 5e6},
        "bf16": {"enabled": True},
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
    }
    numbers = zero_file(read(recipe, written(tmp_path, content)))
    assert (numbers.bucket, numbers.buckets, numbers.gradient, numbers.wire, numbers.weight) == (5_000_000, 2, 4, 4, 2)


def test_a_file_that_takes_what_the_recipe_owns_is_refused(recipe: str, tmp_path: Path) -> None:
    for key, owner in RECIPE_OWNS.items():
        path = written(tmp_path, {"zero_optimization": {"stage": 1}, key: 4})
        with pytest.raises(UserError) as caught:
            read(recipe, path)
        for part in (str(path), f"'{key}' belongs to the recipe", owner):
            assert part in str(caught.value)


def test_an_unknown_name_is_refused_with_those_there_are(recipe: str) -> None:
    with pytest.raises(UserError, match=r"train\.deepspeed = 'zero9': choose one of .*zero2_bf16"):
        read(recipe, "zero9")


@pytest.mark.parametrize(
    ("able", "slow"),
    [({"avx2": True}, True), ({"avx512_bf16": True}, False), ({"amx_bf16": True}, False), ({"bf16": True}, False)],
)
def test_bf16_on_a_cpu_that_has_none_is_said_with_the_float32_file(
    recipe: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, able: dict[str, bool], slow: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: able)
    said = slow_precision(read(recipe, "zero2_bf16"), "cpu")
    assert said.startswith("train.deepspeed = 'zero2_bf16': this CPU has no instructions for bf16") == slow
    assert said.endswith("choose train.deepspeed=zero2") == slow
    own = read(recipe, written(tmp_path, {"bf16": {"enabled": True}}))
    assert slow_precision(own, "cpu").endswith("choose a DeepSpeed file without bf16") == slow
    assert not slow_precision(read(recipe, "zero2"), "cpu")
    assert not slow_precision(read(recipe, "zero2_bf16"), "cuda")


def test_a_plan_for_such_a_cpu_says_so_first(recipe: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True})
    monkeypatch.setattr(planning, "corpus_of", lambda *_: None)
    monkeypatch.setattr(planning, "make_plan", lambda *_: Planned(["of the plan"]))
    config = load_config(recipe, ["train.deepspeed=zero2_bf16"])
    for device, lines in (("cpu", 2), ("gpu", 1)):
        said = planning.plan_recipe(config, 2, device, [3, 4], 1.0, 1.0, 0.5).assumptions
        assert len(said) == lines
        assert ("zero2_bf16': this CPU has no instructions" in said[0]) == (device == "cpu")
