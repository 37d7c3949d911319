"""On a GPU, a full batch goes through the model and the loss without the host waiting for the device once."""

from dataclasses import fields, replace

import pytest
import torch
from helpers import make_batch, make_network, model_settings

from jointfuse.config import LossSettings
from jointfuse.data.batch import Batch
from jointfuse.train.objective import Objective


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("accumulation", [1, 2])
def test_on_a_gpu_a_full_batch_goes_forward_and_back_without_a_wait(accumulation: int) -> None:
    from jointfuse.train.pool import pool_step

    objective = Objective(make_network(model_settings()).cuda().train(), LossSettings(), accumulation).cuda()
    batches = [move(make_batch([7, 2, 1], [120, 16, 33])) for _ in range(accumulation)]
    for warm in (True, False):
        torch.cuda.synchronize()
        torch.cuda.set_sync_debug_mode("default" if warm else "error")
        try:
            pooled = pool_step(objective, batches, 3 * accumulation, torch.manual_seed) if accumulation > 1 else None
            for number, batch in enumerate(batches):
                losses = objective(batch, 3 * accumulation, *(pooled.gradients(number) if pooled else ()))
                losses["loss"].backward()
        finally:
            torch.cuda.set_sync_debug_mode("default")


def move(batch: Batch) -> Batch:
    tensors = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return replace(batch, **{name: value.cuda() for name, value in tensors.items() if isinstance(value, torch.Tensor)})
