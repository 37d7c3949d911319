"""A GPU of which only shapes are there: torch's fake tensors on "cuda", and all that is done to them watched.

Where torch asks for a real GPU something stands in here: for the engine of autograd a walk along its graph, and for the
choice between kernels of attention torch's rules (aten/src/ATen/native/transformers/cuda/sdp_utils.cpp).
"""

import heapq
import weakref
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.function import BackwardCFunction
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from jointfuse.data import features

Module = TypeVar("Module", bound=nn.Module)
DEVICE = torch.device("cuda", 0)
aten = torch.ops.aten
# The host waits for what these give, or for how much of it there is.
WAITS = {
    "_local_scalar_dense", "nonzero", "nonzero_static", "is_nonzero", "item", "equal", "masked_select", "unique_dim",
    "_unique", "_unique2", "unique_consecutive", "bincount", "histc", "repeat_interleave", "allclose", "is_pinned",
}  # fmt: skip
INDEXING = {"index", "index_put", "index_put_", "_unsafe_index"}  # by a mask it begins with nonzero


@contextmanager
def fake_gpu() -> Iterator[None]:
    """New tensors are fake inside; autograd's graphs are walked by `backward` and `torch.autograd.grad`."""
    with pytest.MonkeyPatch.context() as patch, FakeTensorMode(allow_non_fake_inputs=True), _Attention():
        patch.setattr(torch.autograd, "grad", _grad)
        patch.setattr(torch._C, "_current_graph_task_id", lambda: 1)  # by which checkpointing knows a backward pass
        features.window_and_filters.cache_clear()
        yield
    features.window_and_filters.cache_clear()


def on_gpu(module: Module) -> Module:
    """Parameters and buffers of a module on the meta device, moved to the fake GPU."""
    for owner in module.modules():
        for name, parameter in owner._parameters.items():
            if parameter is not None:
                moved = torch.empty_like(parameter, device=DEVICE)
                owner._parameters[name] = nn.Parameter(moved, requires_grad=parameter.requires_grad)
        for name, buffer in owner._buffers.items():
            if buffer is not None:
                owner._buffers[name] = torch.empty_like(buffer, device=DEVICE)
    return module


# ---------------------------------------------------------------------------------------------------------- operations


class Watched(TorchDispatchMode):
    """What is done inside: waits, tensors that are not on the GPU, precisions, and bytes that are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.operations: Counter[str] = Counter()
        self.waits: list[str] = []
        self.strays: list[str] = []  # tensors made on the host, or copied from it while it waits
        self.precisions: dict[str, set[tuple[torch.dtype, ...]]] = defaultdict(set)  # of what an operation was given
        self.results: dict[str, set[tuple[torch.dtype, ...]]] = defaultdict(set)
        self.live = self.peak = 0
        self.known: dict[int, int] = {}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        name = function._overloadpacket.__name__
        self._look(name, args, given)
        for tensor in given:
            self.follow(tensor, counted=False)
        result = function(*args, **kwargs)
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        if function.namespace == "aten" and results:
            self.operations[name] += 1
            self.precisions[name].add(tuple(tensor.dtype for tensor in given))
            self.results[name].add(tuple(tensor.dtype for tensor in results))
        self._look_at(name, given, results, kwargs)
        for tensor in results:
            self.follow(tensor)
        return result

    def _look(self, name: str, args: Any, given: Sequence[torch.Tensor]) -> None:
        by_mask = name in INDEXING and any(
            isinstance(index, torch.Tensor) and index.dtype == torch.bool for index in tree_leaves(args[1])
        )
        if (name in WAITS or by_mask) and any(tensor.device.type == "cuda" for tensor in given):
            self.waits.append(name)

    def _look_at(self, name: str, given: Sequence[torch.Tensor], results: Sequence[torch.Tensor], kwargs: Any) -> None:
        sources, targets = ({tensor.device.type for tensor in tensors} for tensors in (given, results))
        if "cuda" in sources and "cpu" in targets:
            self.waits.append(f"{name} to the host")
        elif (
            "cuda" in targets and "cpu" in sources and name in ("_to_copy", "copy_") and not kwargs.get("non_blocking")
        ):
            self.waits.append(f"{name} from the host")
        elif targets == {"cpu"}:
            self.strays.append(f"{name} {[tuple(tensor.shape) for tensor in results]}")

    def dtypes(self) -> set[torch.dtype]:
        """Of all that was computed."""
        return {dtype for seen in self.results.values() for dtypes in seen for dtype in dtypes}

    def prepare(self, module: nn.Module) -> None:
        """Count a module's tensors."""
        for tensor in [*module.parameters(), *module.buffers()]:
            self.follow(tensor)

    def follow(self, tensor: torch.Tensor, counted: bool = True) -> None:
        """Count the storage of a tensor on the GPU until it dies; what was there before counts only if asked for."""
        if tensor.device.type != "cuda":
            return
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes() if counted else 0
        if key in self.known:
            return
        self.known[key] = size
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._died, key)

    def _died(self, key: int) -> None:
        self.live -= self.known.pop(key, 0)


# ----------------------------------------------------------------------------------------------------------- attention


def kernels_of_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None, dropout: float = 0.0
) -> set[str]:
    """Which of torch's fused kernels take a call on a GPU of compute capability 8.0 or more, cuDNN's left out."""
    shaped = all(x.ndim == 4 for x in (q, k, v)) and q.shape[:2] == k.shape[:2] == v.shape[:2]
    lengths = q.shape[2] > 0 and k.shape[2] > 0
    dense = all(x.stride(-1) == 1 for x in (q, k, v)) and (mask is None or mask.stride(-1) == 1)
    alike = q.dtype == k.dtype == v.dtype
    if not (shaped and lengths and dense and alike):
        return set()
    kernels = set()
    half = q.dtype in (torch.float16, torch.bfloat16)
    widths = {x.shape[-1] for x in (q, k, v)}
    if half and mask is None and len(widths) == 1 and max(widths) <= 256:
        kernels.add("flash")
    unit = 8 if half else 4  # elements in 16 bytes
    fits = mask is None or mask.dtype in (torch.bool, q.dtype)
    if q.dtype in (torch.float16, torch.bfloat16, torch.float32) and fits and not any(width % unit for width in widths):
        kernels.add("efficient")
    return kernels


class _Attention(TorchFunctionMode):
    """Attention by the fused kernel that takes a mask, as torch calls it on a GPU."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is not nn.functional.scaled_dot_product_attention:
            return function(*args, **(kwargs or {}))
        return self.attention(*args, **(kwargs or {}))

    def attention(
        self,
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        scale: float | None = None,
    ) -> torch.Tensor:
        shapes = [tuple(x.shape) for x in (q, k, v)] + [None if attn_mask is None else tuple(attn_mask.shape)]
        assert "efficient" in kernels_of_attention(q, k, v, attn_mask, dropout_p), f"{q.dtype} {shapes}: math kernel"
        bias = attn_mask
        if bias is not None:
            if bias.dtype == torch.bool:
                bias = torch.zeros_like(bias, dtype=q.dtype).masked_fill_(~bias, -torch.inf)
            if odd := -bias.shape[-1] % 8:
                bias = nn.functional.pad(bias, (0, odd))[..., : bias.shape[-1]]
            bias = bias.expand(*q.shape[:3], k.shape[2])
        kept = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
        return aten._scaled_dot_product_efficient_attention(q, k, v, bias, kept, dropout_p, scale=scale)[0]


# ------------------------------------------------------------------------------------------------------------ autograd


def backward(loss: torch.Tensor) -> None:
    """As loss.backward(), after which its graph is gone."""
    for variable, gradient in _walked(loss):
        if variable.grad is None:
            variable.grad = gradient
        else:
            variable.grad.add_(gradient)


def _grad(output: torch.Tensor, inputs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, ...]:
    arrived: dict[int, torch.Tensor] = {}
    for variable, gradient in _walked(output):
        arrived[id(variable)] = arrived[id(variable)] + gradient if id(variable) in arrived else gradient
    return tuple(arrived[id(one)] for one in inputs)


@torch.no_grad()
def _walked(output: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """The leaves of a graph and what arrives at them, in the order of autograd's engine. A node that is done goes, and
    what it has saved with it."""
    with torch.enable_grad():
        root = output.clone().grad_fn  # a function written in Python would be gone with its output
    gradient = torch.ones_like(output)
    output.detach_()
    waiting = _consumers(root)
    arrived: dict[Any, dict[int, torch.Tensor]] = {root: {0: gradient}}
    owners: dict[Any, list[Any]] = defaultdict(list)  # a function written in Python lives as long as what it gives to
    ready = [(0, 0, root)]
    number = 0
    del root, gradient
    while ready:
        *_, node = heapq.heappop(ready)
        given, following = arrived.pop(node), node.next_functions
        if hasattr(node, "variable"):
            yield node.variable, given[0]
            continue
        results = _applied(node, given)
        owners.pop(node, None)
        for after, _ in following:
            if isinstance(after, BackwardCFunction):
                owners[after].append(node)
        del node, given
        for after, slot in following:
            gradient = results.pop(0)
            if after is None:
                continue
            slots = arrived.setdefault(after, {})
            if gradient is not None:
                expected = after._input_metadata[slot]
                assert gradient.device == expected.device
                gradient = gradient.sum_to_size(expected.shape).to(expected.dtype)
                slots[slot] = slots[slot] + gradient if slot in slots else gradient
            waiting[after] -= 1
            if not waiting[after]:
                del waiting[after]
                number += 1
                heapq.heappush(ready, (-after._sequence_nr(), number, after))
        del following, after, gradient


def _consumers(root: Any) -> Counter[Any]:
    """How many gradients every node of a graph waits for."""
    waiting: Counter[Any] = Counter()
    stack = [root]
    while stack:
        for node, _ in stack.pop().next_functions:
            if node is not None:
                if node not in waiting:
                    stack.append(node)
                waiting[node] += 1
    return waiting


def _applied(node: Any, given: dict[int, torch.Tensor]) -> list[torch.Tensor | None]:
    if not given:
        return [None] * len(node.next_functions)
    gradients = [given.get(slot) for slot in range(len(node._input_metadata))]
    results = node.apply(*gradients) if isinstance(node, BackwardCFunction) else node(*gradients)
    return list(results) if isinstance(results, tuple) else [results]
