"""What should change speed or memory and nothing else: workers, batches made ahead, checkpointing, compilation."""

import sys
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from distributed import end_ranks, run_ranks
from helpers import gradients, make_batch, make_network, model_settings
from torch.utils._python_dispatch import TorchDispatchMode
from training_fixtures import DROPOUT, Trained, corpus, largest_difference, moved, recipe, train, trainer

import jointfuse
from jointfuse.config import load_config
from jointfuse.data.batch import Batch
from jointfuse.errors import UserError
from jointfuse.model.network import Network

__all__ = ["corpus", "recipe"]

pytestmark = pytest.mark.required
AUGMENT = "data.augment={speed: 0.1, noise: [10, 40], gain: 6, bin_masks: [1, 8], frame_masks: [1, 8]}"
SWITCHES = {
    "workers": ("data.workers=2",),
    "batches made ahead": (),
    "checkpointing block": ("train.checkpointing=block",),
    "checkpointing attention": ("train.checkpointing=attention",),
    "checkpointing layer": ("train.checkpointing=layer",),
}
# Accumulated: with it the contrastive loss takes its pool before the step.
POOLS = {"one pool a micro-batch": (), "one pool a step": ("train.micro_batch=1",)}
PACKAGE = Path(jointfuse.__file__).parent
Runs = dict[str, Any]


def every_switch(recipe: Path, folder: Path) -> Runs:
    """On each of two ranks: 20 steps plainly and with each switch; the same compiled; where the host waits."""
    runs: Runs = {"plain": train(recipe, folder / "plain", *DROPOUT, AUGMENT)}
    for name, settings in SWITCHES.items():
        with made_ahead() if name == "batches made ahead" else nothing():
            runs[name] = train(recipe, folder / name, *DROPOUT, AUGMENT, *settings)
    runs["still"] = train(recipe, folder / "still", "train.steps=8")
    with compiled_by("aot_eager"):
        settings = ("train.steps=8", "train.compile=true", "train.checkpointing=block")
        runs["compiled"] = train(recipe, folder / "compiled", *settings)
    for name, settings in POOLS.items():
        with trainer(recipe, folder / name, "train.steps=7", *settings) as made:
            runs[f"waits, {name}"] = waits_of(made)
    return runs


@contextmanager
def nothing() -> Iterator[None]:
    yield


@contextmanager
def made_ahead() -> Iterator[None]:
    """Batches through the thread that on a GPU makes them ahead."""
    from jointfuse.data.feed import Feed, ahead

    plainly = Feed.__iter__

    def by_thread(self: Feed) -> Iterator[Any]:
        return ahead((host.to(self.device, self.front_end) for host in self.batches), 2)

    Feed.__iter__ = by_thread  # type: ignore[method-assign]
    try:
        yield
    finally:
        Feed.__iter__ = plainly  # type: ignore[method-assign]


@contextmanager
def compiled_by(backend: str) -> Iterator[None]:
    """A backend that traces as the usual one does and writes no C++, which would take a minute."""
    from jointfuse.model.fused import Fused

    usual, Fused.backend = Fused.backend, backend
    try:
        yield
    finally:
        Fused.backend = usual


def _library(path: Path) -> str:
    if path.is_relative_to(PACKAGE):
        return "jointfuse"
    return path.parts[path.parts.index("site-packages") + 1] if "site-packages" in path.parts else ""


class Waits(TorchDispatchMode):
    """Counts, by the library that asked, what makes the host wait for a GPU: numbers read, sizes that depend on data,
    tensors made of host numbers."""

    OPERATIONS = (
        "_local_scalar_dense", "nonzero", "masked_select", "_unique2", "unique_dim", "bincount", "equal", "is_nonzero",
        "lift_fresh",
    )  # fmt: skip
    METHODS = ("tolist", "cpu", "numpy")

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.removeprefix("aten::")
        by_mask = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if name in self.OPERATIONS or by_mask:
            self.note(name)
        return func(*args, **(kwargs or {}))

    def note(self, what: str) -> None:
        """Under the name of the innermost library other than torch."""
        frame: Any = sys._getframe(1)
        while frame is not None:
            path = Path(frame.f_code.co_filename)
            library = _library(path)
            if library in ("jointfuse", "deepspeed", "transformers", "timm"):
                self.found[library, f"{what} at {path.name}:{frame.f_lineno}"] += 1
                return
            frame = frame.f_back

    @contextmanager
    def watching(self) -> Iterator[None]:
        usual = {name: getattr(torch.Tensor, name) for name in self.METHODS}

        def noting(name: str) -> Callable[..., Any]:
            def method(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
                self.note(name)
                return usual[name](tensor, *args, **kwargs)

            return method

        for name in usual:
            setattr(torch.Tensor, name, noting(name))
        try:
            with self:
                yield
        finally:
            for name, method in usual.items():
                setattr(torch.Tensor, name, method)


def waits_of(made: Any) -> list[Counter[tuple[str, str]]]:
    """Of every step of a run, its log and its evaluations left out."""
    step, found = made._step, []

    def watched(*arguments: Any) -> None:
        waits = Waits()
        with waits.watching():
            step(*arguments)
        found.append(waits.found)

    made._step = watched
    made.train()
    return found


@pytest.fixture(scope="module")
def runs(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    folder = tmp_path_factory.mktemp("switches")
    end_ranks(2)  # ZeRO-3 would have left them a linear function that cannot be compiled
    result: Runs = run_ranks(2, every_switch, folder / "ranks", recipe, folder)[0]
    return result


@pytest.mark.parametrize("name", SWITCHES)
def test_a_switch_changes_no_loss_and_no_weight(runs: Runs, name: str) -> None:
    plain, switched = runs["plain"], runs[name]
    assert plain.losses.shape == (20, 3)
    assert np.array_equal(switched.losses, plain.losses)
    assert largest_difference(switched.weights, plain.weights) == 0


def test_a_compiled_model_loses_what_the_plain_one_does(runs: Runs) -> None:
    still: Trained = runs["still"]
    compiled: Trained = runs["compiled"]
    # Fused operations round elsewhere.
    assert np.abs(compiled.losses - still.losses).max() < 2e-5
    assert largest_difference(moved(compiled.weights), moved(still.weights)) < 1e-4


@pytest.mark.parametrize("pool", POOLS)
def test_in_a_full_batch_none_of_our_own_lines_makes_the_host_wait_for_the_device(runs: Runs, pool: str) -> None:
    steps = runs[f"waits, {pool}"]
    assert len(steps) == 7, "all of them full"
    for found in steps:
        assert [line for (library, line), _ in found.items() if library == "jointfuse"] == []
    assert any(library == "deepspeed" for found in steps for library, _ in found), "what waits is seen"


def backward_of(network: Network, batch: Batch) -> dict[str, torch.Tensor]:
    network.zero_grad()
    logits, features = network(batch)
    (logits.square().sum() + features.square().sum()).backward()
    return gradients(network)


def test_lengths_and_batch_sizes_that_were_not_there_before_compile_nothing() -> None:
    from torch._dynamo.testing import CompileCounterWithBackend

    settings = model_settings(modality="audio", vision__stem_layers=1, vision__dropout=0.0)
    network, plain = make_network(settings, compiled=True).train(), make_network(settings).train()
    counter: Any = CompileCounterWithBackend("inductor")
    network.fused.backend = counter  # type: ignore[union-attr]
    compiled = []
    for frames in ([120, 16, 33], [50, 80], [200, 10, 33, 57], [0, 91]):
        batch = make_batch([0] * len(frames), frames)
        expected = backward_of(plain, batch)
        for name, gradient in backward_of(network, batch).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-5, msg=name)
        compiled.append(counter.frame_count)
    assert compiled[0] > 0
    assert len(set(compiled)) == 1


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        (("train.deepspeed=zero3",), "under ZeRO-3 layers are never whole"),
        (("train.checkpointing=layer",), "choose none or block"),
        (("train.checkpointing=attention",), "choose none or block"),
    ],
)
def test_what_compilation_does_not_go_with_is_said(recipe: Path, settings: tuple[str, ...], expected: str) -> None:
    from jointfuse.train.deepspeed_file import read_deepspeed_file
    from jointfuse.train.engine import check_compile

    chosen = load_config(str(recipe), [*settings, "train.compile=true"]).train
    with pytest.raises(UserError, match=expected):
        check_compile(chosen, read_deepspeed_file(chosen).stage)
