"""Layers and blocks through torch.compile: what lies between their matrix products becomes one pass over memory."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

# Every kind of layer, with and without gradients, is a form of the same function.
FORMS = 64


class Fused:
    """Compiled forms of modules, made when first called. Lengths and batch sizes stay free: new ones compile nothing.

    The modules themselves, and so their parameters' names, stay as they are.
    """

    backend = "inductor"

    def __init__(self) -> None:
        import torch._dynamo.config as dynamo

        dynamo.recompile_limit = max(dynamo.recompile_limit, FORMS)
        self.made: dict[nn.Module, Callable[..., Any]] = {}

    def __call__(self, module: nn.Module) -> Callable[..., Any]:
        if module not in self.made:
            self.made[module] = torch.compile(module, dynamic=True, backend=self.backend)
        return self.made[module]
