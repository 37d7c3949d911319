from __future__ import annotations

from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from distributed import run_ranks
from training_fixtures import Stopped, corpus, recipe, stage_file, trainer

from jointfuse.bench.device import Collectives
from jointfuse.capacity.corpus import corpus_of
from jointfuse.capacity.plan import Plan, make_plan
from jointfuse.capacity.rates import Rates
from jointfuse.config import load_config

__all__ = ["corpus", "recipe"]

LIKED = Rates(1e12, 1e9, "given", "given")
WHOLE = 5  # the fifth step of the tiny corpus: the optimizer has its state, and every utterance counts
# In what a DeepSpeed optimizer keeps its part of the gradients, by class.
KEPT_GRADIENTS = ("averaged_gradients", "grad_partitions_flat_buffer", "fp32_groups_gradients_flat")


def storages(found: Any) -> dict[int, int]:
    """Bytes by address of the distinct storages of all tensors in lists and dicts of them."""
    if isinstance(found, dict):
        found = list(found.values())
    if isinstance(found, list | tuple):
        return {address: size for one in found for address, size in storages(one).items()}
    return {found.untyped_storage().data_ptr(): found.untyped_storage().nbytes()} if found is not None else {}


def counted_bytes(engine: Any) -> dict[str, int]:
    """What a rank holds of weights, gradients and optimizer before the optimizer's step."""
    parameters = list(engine.module.parameters())
    optimizer = engine.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    weights = storages([getattr(one, "ds_tensor", one) for one in parameters])
    gradients = storages([one.grad for one in parameters])
    for name in KEPT_GRADIENTS:
        gradients |= storages(getattr(optimizer, name, None))
    masters = storages([group["params"] for group in inner.param_groups])
    moments = storages([[value for key, value in state.items() if key != "step"] for state in inner.state.values()])
    kept = {address: size for address, size in (masters | moments).items() if address not in weights}
    return {
        name: sum(of.values()) for name, of in (("weights", weights), ("gradients", gradients), ("optimizer", kept))
    }


def measured(recipe: Path, folder: Path, cases: dict[str, list[str]]) -> dict[str, dict[str, int]]:
    """On each of two ranks: bytes held in the midst of a step, and given to collectives in a whole one."""
    found = {}
    for name, settings in cases.items():
        with trainer(recipe, folder / name, *settings) as made, Collectives() as seen:
            made.log_every = 100
            step, apply = made._step, made.engine.step
            begun, held = [], {}

            def noted_step(*arguments: Any) -> None:
                begun.append(len(seen.given))
                if len(begun) > WHOLE:
                    raise Stopped
                step(*arguments)

            def noted_apply() -> None:
                if made.position.step == WHOLE and made.engine.is_gradient_accumulation_boundary():
                    held.update(counted_bytes(made.engine))
                apply()

            made._step, made.engine.step = noted_step, noted_apply
            with suppress(Stopped):
                made.train()
            made.log and made.log.close()
            given: dict[str, int] = {}
            for kind, size in seen.given[begun[WHOLE - 1] : begun[WHOLE]]:
                given[kind] = given.get(kind, 0) + size
            found[name] = held | {
                "tokens": len(made.tokenizer),
                "given": given,
                "list": seen.given[begun[WHOLE - 1] : begun[WHOLE]],
            }
    return found


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[str]]:
    folder = tmp_path_factory.mktemp("files")
    files = [
        *(f"zero{stage}" for stage in range(4)),
        *(f"zero{stage}_bf16" for stage in range(4)),
        str(stage_file(3, folder)),
    ]
    cases = {Path(file).stem: [f"train.deepspeed={file}"] for file in files}
    frozen = ["train.freeze=[text_encoder,temperature]"]
    for stage in range(4):
        cases[f"zero{stage}-micro"] = [
            f"train.deepspeed=zero{stage}",
            "train.micro_batch=1",
            "loss.pool=micro",
            *frozen,
        ]
    for stage in range(3):
        cases[f"zero{stage}-step"] = [f"train.deepspeed=zero{stage}", "train.micro_batch=1"]
    return cases


@pytest.fixture(scope="module")
def ranks(recipe: Path, cases: dict[str, list[str]], tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("measured")
    return run_ranks(2, measured, folder / "ranks", recipe, folder, cases)


def plan_of(recipe: Path, settings: list[str], ranks: int = 2, tokens: int = 0) -> Plan:
    config = load_config(str(recipe), settings)
    return make_plan(config, ranks, "gpu", corpus_of(config, 4), LIKED, 0.5, tokens)


def test_all(recipe, ranks, cases):
    import pickle

    pickle.dump(ranks, open("/tmp/plan-scratch/ranks.pickle", "wb"))
    for name, settings in cases.items():
        plan = plan_of(recipe, settings, 2, ranks[0][name]["tokens"])
        memory = next(one for one in plan.memory if one.chosen).states
        want = {"weights": memory.trained + memory.frozen, "gradients": memory.gradients, "optimizer": memory.optimizer}
        for rank in ranks:
            got = rank[name]
            print(name, {k: (got[k], v) for k, v in want.items()}, got["given"])
        w = {}
        for c in plan.wire:
            w[c.kind] = w.get(c.kind, 0) + c.given
            print("    ", c)
        print("   ", w)
    assert 0
