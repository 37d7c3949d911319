"""The moments of a step and what each of them takes: the largest is the memory that a training needs."""

from dataclasses import dataclass

from jointfuse.capacity.pool import Pool
from jointfuse.capacity.rehearsal import Device, Lengths, Rehearsal, batch_of_shapes, front_end_peak
from jointfuse.capacity.states import States
from jointfuse.capacity.wire import Step
from jointfuse.capacity.zero import ZeroFile
from jointfuse.data.feed import AHEAD


@dataclass(frozen=True)
class Load:
    """Bytes of a step beside weights, gradients, optimizer and activations."""

    batches: int  # of the step, and on a GPU those made ahead
    front_end: int  # while one of them is made
    pool_held: int  # features and statistics of the contrastive loss
    pool_passing: int  # in its backward pass


def load_of(step: Step, longest: Lengths, pool: Pool | None, device: Device) -> Load:
    batch = batch_of_shapes(step.rows, longest)
    size = sum(value.nbytes for value in vars(batch).values() if hasattr(value, "nbytes"))
    on_gpu = device == "gpu"
    return Load(
        batches=(step.micro_steps + AHEAD * on_gpu) * size,
        front_end=front_end_peak(step.rows, longest) if step.hears else 0,
        pool_held=pool.held(step.width) if pool else 0,
        pool_passing=pool.passing(step.width, on_gpu) if pool else 0,
    )


def peak(
    file: ZeroFile, found: States, activations: Rehearsal, load: Load, step: Step, device: Device
) -> tuple[int, str]:
    """The largest of the moments of a step, in bytes on one device, and which it is."""
    on_gpu, accumulates = device == "gpu", step.micro_steps > 1
    # Gradients that wait where nothing was reserved for them come while activations go.
    kept_whole = file.stage == 0 or file.keeps_whole_gradients
    come = (kept_whole and not accumulates) if on_gpu else (file.stage >= 2 or not accumulates)
    working = activations.peak_with_gradients if come else activations.peak
    pooling = load.pool_held + load.pool_passing
    resting = found.resting + load.batches
    moments = {
        "micro-step": (
            resting
            + found.held
            + found.buckets
            + found.gathered
            + working
            + (load.front_end if on_gpu else 0)
            + (0 if step.pools_beforehand else pooling)
        ),
        "pool": resting + pooling if step.pools_beforehand else 0,
        "batch": resting + load.front_end,
        "reduction": resting + found.gradients + found.buckets + found.reducing,
        "update": resting + found.gradients + found.updating,
    }
    largest = max(moments, key=lambda moment: moments[moment])
    return moments[largest], largest
