"""On a GPU of which only shapes are there: every recipe at its true sizes, in float32 and bf16.

Nothing makes the host wait, nothing strays to the host, precision is kept where it is needed, attention gets a fused
kernel, and what is held is what `jointfuse plan` says.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import cache
from typing import Any

import pytest
import torch
from fake_gpu import DEVICE, Watched, backward, fake_gpu, kernels_of_attention, on_gpu
from helpers import model_settings
from triton.runtime import JITFunction
from triton.runtime.interpreter import InterpretedFunction

from jointfuse.capacity.corpus import corpus_of
from jointfuse.capacity.plan import Plan, make_plan
from jointfuse.capacity.rates import Rates
from jointfuse.capacity.shapes import objective_of_shapes
from jointfuse.config import Config, LossSettings, load_config
from jointfuse.data.batch import Batch, HostBatch
from jointfuse.data.features import FrontEnd, continued_length
from jointfuse.data.mel import HOP_LENGTH
from jointfuse.evaluate.predict import judged
from jointfuse.losses.backends import triton
from jointfuse.losses.icl import Known, Queue, contrast
from jointfuse.model.network import Network
from jointfuse.train.objective import Objective
from jointfuse.train.pool import pool_step

pytestmark = pytest.mark.required

RECIPES = ("demo", "small", "paper-base", "paper-large")
PRECISIONS = {"float32": torch.float32, "bf16": torch.bfloat16}
CLASSES = 7
GIVEN = Rates(1e12, 1e9, "given", "given", 0.5)
FRONT_END = FrontEnd(-4.0, 3.0)
ODD = (37, 333)  # tokens, frames


def recipe(name: str, *overrides: str) -> Config:
    return load_config(name, list(overrides))


def longest(config: Config) -> tuple[int, int]:
    return config.data.max_tokens, 1 + round(config.data.max_seconds * 100)


def host_batch(rows: int, lengths: tuple[int, int]) -> HostBatch:
    """As workers give it: the longest text and clip of these lengths, two masks each of bins and frames."""
    tokens, frames = lengths

    def tensor(*shape: int, dtype: torch.dtype = torch.long) -> torch.Tensor:
        return torch.empty(*shape, dtype=dtype)

    return HostBatch(
        ids=tensor(rows),
        tokens=tensor(rows, tokens),
        token_mask=tensor(rows, tokens, dtype=torch.bool),
        token_places=tensor(rows * tokens - 5),
        clips=tensor(rows, continued_length((frames - 1) * HOP_LENGTH), dtype=torch.int16),
        frames=tensor(rows),
        bin_masks=tensor(rows, 2, 2),
        frame_masks=tensor(rows, 2, 2),
        labels=tensor(rows),
        valid=tensor(rows, dtype=torch.bool),
        cut_tokens=0,
        cut_audio=0,
        skipped=[],
    )


def moved(hosts: list[HostBatch]) -> list[Batch]:
    return [host.to(DEVICE, FRONT_END) for host in hosts]


@contextmanager
def trained(config: Config, precision: str, accumulation: int = 1) -> Iterator[Objective]:
    """The objective of a recipe on a fake GPU."""
    objective = objective_of_shapes(config, CLASSES, accumulation).to(PRECISIONS[precision]).train()
    with fake_gpu():
        moved([host_batch(1, ODD)])  # window and filters of the mel go to a GPU once
        yield on_gpu(objective)


def step(objective: Objective, micro: list[Batch]) -> None:
    """As the training loop takes it."""
    total = sum(len(batch.ids) for batch in micro)
    pooled = pool_step(objective, micro, total, lambda _: None) if objective.pools_beforehand else None
    for number, batch in enumerate(micro):
        backward(objective(batch, total, *(pooled.gradients(number) if pooled else ()))["loss"])


def check(watched: Watched, precision: str) -> None:
    """No waits, no strays, no float64; float32 in norms, in what judges and in the loss."""
    assert watched.waits == []
    # Checkpointing keeps its graph alive by a tensor of nothing.
    assert [stray for stray in watched.strays if stray != "empty [(0,)]"] == []
    kinds = watched.dtypes()
    assert not kinds & {torch.float64, torch.complex128}
    halved = {name for name, seen in watched.results.items() if any(torch.bfloat16 in dtypes for dtypes in seen)}
    if precision == "bf16":
        assert halved
    else:  # what losses/parts.py multiplies
        assert halved <= {"_to_copy", "view", "slice", "unsqueeze"}
    for norm in watched.results["native_layer_norm"]:
        assert norm[1:] == (torch.float32, torch.float32), "mean and deviation"
    for operation in ("_log_softmax", "logsumexp", "linalg_vector_norm"):
        for given, results in zip(watched.precisions[operation], watched.results[operation], strict=False):
            assert set(results) == {torch.float32}, operation
            assert set(given) <= {torch.float32} or operation == "linalg_vector_norm", operation


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", RECIPES)
def test_a_step_of_every_recipe_stays_on_the_gpu_and_keeps_its_precision(name: str, precision: str) -> None:
    """Two micro-batches with augmentation masks, pooled beforehand, with a trained temperature; then an evaluation."""
    config = recipe(name, "loss.pool=step", "loss.train_temperature=true")
    with trained(config, precision, accumulation=2) as objective:
        hosts = [host_batch(3, ODD) for _ in range(2)]
        with Watched() as watched:
            micro = moved(hosts)
            assert micro[0].mel.dtype == torch.float32
            assert watched.results["_fft_r2c"] == {(torch.complex64,)}
            step(objective, micro)
        check(watched, precision)
        assert watched.operations["_scaled_dot_product_efficient_attention_backward"]
        for parameter in objective.parameters():
            assert parameter.device.type == "cuda"
            assert (parameter.grad is not None) == parameter.requires_grad
        with Watched() as watched:
            objective.network.eval()
            _, _, _, logits, features = judged(objective.network, moved(hosts))
        check(watched, precision)
        assert logits.dtype == features.dtype == torch.float32
        assert logits.shape == (6, CLASSES)


def _copied(x: torch.Tensor) -> None:
    x.copy_(torch.ones(3))


@pytest.mark.parametrize(
    "waiting",
    [
        lambda x: x.sum().item(),
        lambda x: bool(x.isfinite().all()),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.nonzero(),
        lambda x: x.long().unique(),
        lambda x: x.long().bincount(),
        lambda x: x.repeat_interleave(x.long()),
        lambda x: torch.tensor([1.0, 2.0, 3.0], device=x.device),
        lambda x: x + torch.ones(3).to(x.device),
        _copied,
    ],
)
def test_what_makes_the_host_wait_is_seen(waiting: Callable[[torch.Tensor], Any]) -> None:
    with fake_gpu(), Watched() as watched:
        x = torch.empty(3, device=DEVICE)
        assert watched.waits == []
        with suppress(Exception):  # what cannot be known of a shape
            waiting(x)
        assert watched.waits


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_queue_moves_on_without_a_wait(precision: str) -> None:
    config = recipe("demo", "loss.pool=queue", "loss.queue=40")
    with trained(config, precision) as objective:
        host = host_batch(16, ODD)
        with Watched() as watched:
            for _ in range(3):  # 40 keys are full in the third
                step(objective, moved([host]))
        check(watched, precision)


@cache
def planned(name: str, precision: str) -> Plan:
    """Of a step of one micro-batch, gradients and weights kept whole."""
    config = recipe(name)
    rows = config.train.micro_batch or config.train.batch
    file = "zero0" if precision == "float32" else "zero0_bf16"
    config = recipe(name, f"train.batch={rows}", "train.micro_batch=null", f"train.deepspeed={file}")
    return make_plan(config, 1, "gpu", corpus_of(config, [100] * CLASSES), GIVEN)


@pytest.mark.parametrize(
    ("name", "precision", "mode"),
    [
        *((name, precision, None) for name in RECIPES for precision in PRECISIONS),
        *(("demo", "bf16", mode) for mode in ("block", "attention", "layer")),
    ],
)
def test_what_a_step_holds_is_what_plan_says(name: str, precision: str, mode: str | None) -> None:
    """In the recipe's own mode of checkpointing, or another."""
    plan = planned(name, precision)
    memory, own = plan.memory[plan.config.train.deepspeed], plan.config.train.checkpointing
    mode, rows = mode or own, plan.division.micro_batch
    with trained(plan.config, precision) as objective:
        objective.network.checkpointing = mode
        host = host_batch(rows, longest(plan.config))
        with Watched() as watched:
            watched.prepare(objective)
            weights = watched.live
            micro = moved([host] * 3)  # two of them made ahead
            making, held = watched.peak - watched.live, watched.live - weights
            watched.peak = watched.live
            step(objective, micro[:1])
    load, activations = plan.load, plan.activations[mode]
    said = weights + load.batches + activations.peak_with_gradients + load.pool_held + load.pool_passing
    close = {
        "weights": (weights, memory.states.trained + memory.states.frozen),
        "batches": (held, load.batches),
        "front end": (making + held // 3, load.front_end),
        "micro-step": (watched.peak, said),
    }
    if memory.peak_in == "micro-step" and mode == own:
        close["all"] = watched.peak + making + memory.states.optimizer, memory.peak
    for what, (measured, expected) in close.items():
        assert measured == pytest.approx(expected, rel=0.1), what


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("backend", ["tiled", "triton"])
def test_the_loss_of_a_large_pool_neither_waits_nor_strays(
    backend: str, precision: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernels themselves do nothing here; all that torch does around them is done."""
    monkeypatch.setattr(triton, "check", lambda *_: None)
    monkeypatch.setattr(triton, "INTERPRETED", True)
    for kind in (InterpretedFunction, JITFunction):
        monkeypatch.setattr(kind, "__getitem__", lambda *_: lambda *_, **__: None)
    rows, width, queue = 1500, 1537, 70
    with fake_gpu():
        features = torch.empty(rows, width, dtype=precision, device=DEVICE, requires_grad=True)
        logarithm = torch.zeros(1, device=DEVICE, requires_grad=True)
        labels = torch.empty(rows, dtype=torch.long, device=DEVICE)
        past = Queue(torch.empty(queue, width, device=DEVICE), torch.empty(queue, dtype=torch.long, device=DEVICE))
        known = Known([rows], CLASSES)
        with Watched() as watched:
            loss, statistics, _ = contrast(
                features, labels, logarithm.exp(), backend=backend, queue=past, known=known, finite=False
            )
            backward(loss)
        assert watched.waits == watched.strays == []
        assert torch.float64 not in watched.dtypes()
        assert loss.dtype == statistics.positive.dtype == logarithm.grad.dtype == torch.float32
        assert features.grad.dtype == precision


def test_kernels_of_attention_are_refused_what_torch_refuses_them() -> None:
    q = torch.empty(2, 3, 5, 64, device="meta", dtype=torch.bfloat16)
    mask = torch.empty(2, 1, 1, 5, device="meta", dtype=torch.bool)
    assert kernels_of_attention(q, q, q, None) == {"flash", "efficient"}
    assert kernels_of_attention(q, q, q, mask) == {"efficient"}
    assert kernels_of_attention(q[:, :, :1], q, q, mask) == {"efficient"}
    assert kernels_of_attention(q.float(), q.float(), q.float(), mask) == {"efficient"}
    assert kernels_of_attention(q, q, q, mask.float()) == set()
    assert kernels_of_attention(q[..., :60], q[..., :60], q[..., :60], mask) == set()
    assert kernels_of_attention(q[..., ::8], q[..., ::8], q[..., ::8], mask) == set()
    assert kernels_of_attention(q, q.float(), q, mask) == set()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_heads_of_any_width_get_a_fused_kernel(precision: str) -> None:
    odd = {"text_encoder__scratch__width": 26, "language__scratch__width": 30, "vision__scratch__width": 10}
    with torch.device("meta"):
        network = Network(model_settings(**odd), CLASSES, 48, 6.0, tokenizer_size=300)
    objective = Objective(network, LossSettings(), 1).to(PRECISIONS[precision]).train()
    with fake_gpu():
        on_gpu(objective)
        micro = moved([host_batch(3, ODD)])
        with Watched() as watched:
            step(objective, micro)
    assert watched.operations["_scaled_dot_product_efficient_attention"]
