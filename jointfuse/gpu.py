"""Which of a GPU's kernels a process uses."""

import torch


def choose_kernels() -> None:
    """Called by every process that computes on a GPU, before it does."""
    # cuDNN's attention plans anew for every length, and lengths differ from batch to batch; with a mask its gradients
    # may be NaN (pytorch issue 196678). Without it torch takes the memory-efficient kernel.
    torch.backends.cuda.enable_cudnn_sdp(False)
    # Products of float32 by tensor cores, which keep 10 bits of their factors and sum in float32: recipes that train in
    # float32 would run at a sixth of the rate. Values of a log-mel, a sum of what is positive, move by less than 0.001.
    torch.set_float32_matmul_precision("high")
