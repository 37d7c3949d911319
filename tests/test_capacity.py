"""What `jointfuse plan` says beside what a real engine, real ranks and a real process take."""

import itertools
import os
import sys
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed import end_ranks, run_ranks
from helpers import make_batch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from training_fixtures import SIZES, Stopped, corpus, recipe, stage_file, trainer

from jointfuse import cli
from jointfuse.bench.device import Collectives, peak_bytes, status
from jointfuse.capacity import plan
from jointfuse.capacity.corpus import corpus_of
from jointfuse.capacity.plan import MODES, Plan, make_plan
from jointfuse.capacity.pool import share_without_partner
from jointfuse.capacity.rates import Rates, measured_rates
from jointfuse.capacity.rehearsal import Lengths, Rehearsal, batch_of_shapes, rehearse
from jointfuse.capacity.shapes import objective_of_shapes
from jointfuse.config import load_config
from jointfuse.data.shards import Corpus

__all__ = ["corpus", "recipe"]

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
GIVEN = Rates(1e12, 1e9, "given", "given", 0.5)
WHOLE = 3  # a step in which the optimizer has its state and every utterance counts
ACCUMULATED = ("train.micro_batch=1", "loss.pool=micro", "train.freeze=[text_encoder,temperature]")
POOLED = ("train.micro_batch=1", "data.on_error=skip")
SETTINGS: dict[str, tuple[str, ...]] = {
    **{f"zero{stage}": () for stage in range(4)},
    "every parameter in parts": (),  # ZeRO-3 with a threshold of 0
    "zero2_bf16": (),
    "zero3 accumulated": ACCUMULATED,
    "zero1 pooled": POOLED,
}
if "SOAK_PLAN" in os.environ:  # tools/soak.sh plan
    SETTINGS |= {
        "zero1_bf16": (),
        "zero3_bf16": (),
        "zero2_offload": (),
        "zero3_offload_bf16": (),
        "zero0 accumulated": ACCUMULATED,
        "zero2 pooled": POOLED,
    }
# Beside masters and moments, what an optimizer keeps of offloaded ones.
OFFLOADED = (
    "param_buffer_of_bit16_for_cpu_offload_groups",
    "temp_grad_buffer_for_cpu_offload",
    "temp_grad_buffer_for_gpu_offload",
)


# ------------------------------------------------------------------------------------------- inside the spawned ranks


def storages(found: Any) -> dict[int, int]:
    """Bytes by address of the distinct storages of all tensors in lists and dicts of them."""
    if isinstance(found, dict):
        found = list(found.values())
    if isinstance(found, list | tuple):
        return {address: size for one in found for address, size in storages(one).items()}
    return {} if found is None else {found.untyped_storage().data_ptr(): found.untyped_storage().nbytes()}


def counted_bytes(engine: Any) -> dict[str, int]:
    """Weights, gradients and optimizer of this rank before the optimizer's step, Adam's counters left out."""
    parameters, optimizer = list(engine.module.parameters()), engine.optimizer
    inner = getattr(optimizer, "optimizer", optimizer)
    weights = storages([parameters, [getattr(one, "ds_tensor", None) for one in parameters]])
    gradients = storages([one.grad for one in parameters])
    for name in ("averaged_gradients", "grad_partitions_flat_buffer", "fp32_groups_gradients_flat"):
        gradients |= storages(getattr(optimizer, name, None))
    flat = [group["params"] for group in inner.param_groups] + [getattr(optimizer, "fp32_partitioned_groups_flat", [])]
    masters = storages(flat) | storages([getattr(optimizer, name, None) for name in OFFLOADED])
    if hasattr(optimizer, OFFLOADED[0]) or getattr(optimizer, "offload_optimizer", False):
        masters |= storages([one.grad for group in flat for one in group])
    moments = storages([[value for key, value in state.items() if key != "step"] for state in inner.state.values()])
    kept = {address: size for address, size in (masters | moments).items() if address not in weights}
    return {
        what: sum(of.values()) for what, of in (("weights", weights), ("gradients", gradients), ("optimizer", kept))
    }


def one_step(recipe: Path, run: Path, *settings: str) -> dict[str, Any]:
    """Of step WHOLE: bytes held before the update, and all that goes out until the next step begins."""
    begun: list[int] = []
    held: dict[str, int] = {}
    with trainer(recipe, run, "train.log_every=100", *settings) as made, Collectives() as seen:
        step, apply = made._step, made.engine.step

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
        sent: Counter[str] = Counter()
        for kind, size in seen.given[begun[-2] : begun[-1]]:
            sent[kind] += size
        return {"held": held, "sent": dict(sent), "vocabulary": len(made.tokenizer)}


def every_step(recipe: Path, folder: Path, cases: dict[str, tuple[str, ...]]) -> dict[str, dict[str, Any]]:
    return {name: one_step(recipe, folder / name, *settings) for name, settings in cases.items()}


def peak_of_small(recipe: Path, folder: Path, settings: list[str]) -> int:
    """Most resident memory in two steps of `small`, above what this process has after a tiny training."""
    from jointfuse.train.loop import Trainer
    from jointfuse.train.window import Window

    with trainer(recipe, folder / "tiny", "train.steps=2") as made:
        made.train()
    config = load_config("small", settings)
    rows, frames = config.train.batch, 1 + round(100 * config.data.max_seconds)
    batch = make_batch([config.data.max_tokens] * rows, [frames] * rows, labels=[row % 4 for row in range(rows)])
    peak_bytes(lambda: None)  # from here on what is freed goes back to the system
    before = status("VmRSS")
    made = Trainer(config, folder / "small", False)
    Path("/proc/self/clear_refs").write_text("5")
    for made.position.step in (1, 2):
        made._step(rows, [batch], Window(made))
    return status("VmHWM") - before


# ------------------------------------------------------------------------------------------------------------ the tests


@pytest.fixture(scope="module")
def cases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[str, ...]]:
    """Settings by name; the name begins with that of a DeepSpeed file."""
    cases = {name: (f"train.deepspeed={name.split()[0]}", *settings) for name, settings in SETTINGS.items()}
    in_parts = stage_file(3, tmp_path_factory.mktemp("files"))
    return cases | {"every parameter in parts": (f"train.deepspeed={in_parts}",)}


@pytest.fixture(scope="module")
def ranks(recipe: Path, cases: dict[str, tuple[str, ...]], tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("measured")
    return run_ranks(2, every_step, folder / "ranks", recipe, folder, cases, limit=500)


def plan_of(recipe: Path | str, ranks: int, *settings: str, device: Any = "gpu", vocabulary: int | None = None) -> Plan:
    config = load_config(str(recipe), settings)
    return make_plan(config, ranks, device, corpus_of(config, [5, 5]), GIVEN, vocabulary)


@pytest.fixture(scope="module")
def plans(recipe: Path, ranks: list[Any], cases: dict[str, tuple[str, ...]]) -> dict[str, Plan]:
    """Of each of the cases, for two ranks; without their activations, which take the longest."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "rehearse", lambda *_: Rehearsal(0, 0, 0, 1, 1))
        return {
            name: plan_of(recipe, 2, *settings, vocabulary=ranks[0][name]["vocabulary"])
            for name, settings in cases.items()
        }


@pytest.mark.required
@pytest.mark.parametrize("name", [name for name, settings in SETTINGS.items() if not settings])
def test_weights_gradients_and_optimizer_take_the_bytes_that_an_engine_holds(
    ranks: list[Any], plans: dict[str, Plan], name: str
) -> None:
    told = plans[name].memory[plans[name].config.train.deepspeed].states
    counted = {what: max(rank[name]["held"][what] for rank in ranks) for what in ("weights", "gradients", "optimizer")}
    expected = {"weights": told.trained + told.frozen, "gradients": told.gradients, "optimizer": told.optimizer}
    if told.host:  # where a rank has one memory for both, the host's parts are among the others
        assert sum(counted.values()) == sum(expected.values()) + told.host
    else:
        assert counted == expected


@pytest.mark.required
@pytest.mark.parametrize("name", SETTINGS)
def test_on_the_wire_is_what_the_ranks_give_to_collectives(ranks: list[Any], plans: dict[str, Plan], name: str) -> None:
    told: Counter[str] = Counter()
    for one in plans[name].wire:
        told[{"all-gather": "allgather_base", "all-reduce": "allreduce"}.get(one.kind, "reduce_scatter_base")] += (
            one.given
        )
    for rank in ranks:
        assert rank[name]["sent"] == dict(told)


@pytest.mark.required
def test_the_peak_of_small_is_within_15_percent_of_the_resident_memory(
    recipe: Path, corpus: Path, shared: Path, tmp_path: Path
) -> None:
    models = {"text_encoder": "minilm", "language": "minilm", "vision": "dinov2-small"}
    settings = [f"model.{part}.weights={shared / 'models' / name}" for part, name in models.items()]
    settings.append(f"data.corpus={corpus}")
    end_ranks(1)  # a fresh process: what an earlier one has freed would be used again
    measured = run_ranks(1, peak_of_small, tmp_path / "ranks", recipe, tmp_path, settings)[0]
    end_ranks(1)
    told = plan_of("small", 1, *settings, device="cpu").memory["zero2"].peak
    assert told == pytest.approx(measured, rel=0.15)


@pytest.mark.required
@pytest.mark.parametrize("mode", MODES)
def test_activations_take_what_a_real_step_takes(recipe: Path, mode: str) -> None:
    rows, lengths = 8, Lengths(40, 601)
    sizes = ("model.vision.scratch.width=192", "model.language.scratch.width=128", "model.extractor.dropout=0.1")
    config = load_config(
        str(recipe), [*sizes, "data.max_seconds=6", "data.max_tokens=40", "loss.train_temperature=false"]
    )
    told = rehearse(objective_of_shapes(config, 4, 1), rows, lengths, mode, "cpu")
    objective = objective_of_shapes(config, 4, 1).to_empty(device="cpu").train()
    for tensor in itertools.chain(objective.parameters(), objective.buffers()):
        tensor.data.zero_()
    objective.network.checkpointing = mode
    batch = make_batch([lengths.tokens] * rows, [lengths.frames] * rows)
    assert {key: value.shape for key, value in vars(batch).items() if isinstance(value, torch.Tensor)} == {
        key: value.shape
        for key, value in vars(batch_of_shapes(rows, lengths)).items()
        if isinstance(value, torch.Tensor)
    }
    features = torch.randn(rows, objective.network.feature_width)

    step = [lambda: objective(batch, rows, features)["loss"], lambda loss: loss.backward()]
    kept, _ = allocated(step[:1])
    objective.zero_grad()
    _, most = allocated(step)
    assert kept == pytest.approx(told.kept, rel=0.03)
    assert most == pytest.approx(told.peak_with_gradients, rel=0.03)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as operations:
        objective(batch, rows, features)
    assert operations.get_total_flops() == told.forward


def test_the_share_of_anchors_without_a_partner_is_that_of_all_pools_there_are() -> None:
    counts, keys = [4, 3, 1, 1], 4
    labels = [label for label, count in enumerate(counts) for _ in range(count)]
    pools = list(itertools.combinations(labels, keys))
    alone = sum(pool.count(label) == 1 for pool in pools for label in pool)
    assert share_without_partner(counts, keys) == pytest.approx(alone / (keys * len(pools)), rel=1e-12)
    assert share_without_partner(counts, 100) == pytest.approx(2 / 9), "all there are: two have no like"
    assert share_without_partner(counts, 1) == pytest.approx(1)
    shares = [0.5, 0.3, 0.2]
    drawn = itertools.product(enumerate(shares), repeat=keys)
    expected = 0.0
    for pool in drawn:
        found = [label for label, _ in pool]
        probability = torch.tensor([share for _, share in pool], dtype=torch.float64).prod().item()
        expected += probability * sum(found.count(label) == 1 for label in found) / keys
    assert share_without_partner([], keys, shares) == pytest.approx(expected, rel=1e-12)


def test_a_large_corpus_is_counted_as_precisely_as_a_small_one() -> None:
    exact = sum(share * (1 - share) ** 255 for share in (0.7, 0.2, 0.1))
    assert share_without_partner([7 * 10**8, 2 * 10**8, 10**8], 256) == pytest.approx(exact, rel=1e-4)


def test_classes_and_lengths_are_those_of_the_corpus(recipe: Path, corpus: Path) -> None:
    split = Corpus.open(corpus).split("train")
    found = corpus_of(load_config(str(recipe)), [5, 5])
    assert sum(found.counts) == SIZES["train"]
    assert dict(zip(Corpus.open(corpus).labels, found.counts, strict=True)) == split.info["label_counts"]
    assert found.shares is None
    assert found.mean is not None
    assert found.mean.frames == 1 + round(split.index["duration_ms"].mean() / 10)
    balanced = corpus_of(load_config(str(recipe), ["data.balance=class"]), [5, 5])
    assert balanced.shares == pytest.approx([0.25] * 4)
    weighted = f"data.mix=[{{corpus: {corpus}, weight: 2}}]"
    mixed = corpus_of(load_config(str(recipe), ["data.corpus=", weighted]), [5, 5])
    assert mixed.shares == pytest.approx([count / SIZES["train"] for count in found.counts])


def test_this_machine_s_rates_are_measured_where_none_are_given() -> None:
    rates = measured_rates(None, None, 0.5, torch.float32, 2)
    assert rates.operations > 1e8
    assert rates.bandwidth is not None
    assert rates.bandwidth > 1e6
    assert rates.reached == rates.operations / 2
    given = measured_rates(3.0, 2.0, 1.0, torch.float32, 2)
    assert (given.reached, given.bandwidth) == (3e12, 2e9)


def allocated(work: list[Callable[..., Any]]) -> tuple[int, int]:
    """Bytes that torch's allocator has given out and not got back when one call after the other, each with what the
    one before it returned, is through, while the last result is still there; and the most at any moment."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True, acc_events=True
    ) as profile:
        passed: tuple[Any, ...] = ()
        for call in work:
            passed = (call(*passed),)
    assert profile.profiler is not None
    events = [event for event in profile.profiler.kineto_results.events() if event.name() == "[memory]"]
    held = list(itertools.accumulate(event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())))
    return held[-1], max(held)


def printed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    monkeypatch.setattr(sys, "argv", ["jointfuse", "plan", *map(str, arguments)])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    assert not ended.value.code
    return capsys.readouterr().out


def test_the_command_prints_tables_that_fit_100_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster = ("--nodes", 128, "--gpus-per-node", 8, "--tflops", 700, "--bandwidth", 25)
    text = printed(monkeypatch, capsys, "--recipe", "paper-large", *cluster)
    assert max(map(len, text.splitlines())) <= 100
    assert "…" not in text
    for part in (
        "1024 ranks x 1 accumulated x 4",
        "optimizer",
        "block *",
        "all-gather",
        "4,096",
        "utterances/s",
        "train.batch=4096: a",
    ):
        assert part in text
    column = [
        row.split("|")[-2].strip() for row in README.splitlines() if row.startswith(("| memory", "| ZeRO", "| bytes"))
    ]
    assert [figure in text for figure in column] == [True] * 5, "the README's figures"


def test_a_recipe_of_one_modality_or_without_contrast_has_a_plan_too(recipe: Path) -> None:
    text = plan_of(recipe, 1, "model.modality=text")
    assert (text.wire, text.load.front_end, text.communicating) == ([], 0, 0)
    audio = plan_of(recipe, 2, "model.modality=audio", "loss.icl_weight=0")
    assert audio.pool is None
    assert audio.wire[0].purpose == "gradients"
