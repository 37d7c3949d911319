"""What a DeepSpeed file decides about memory and traffic."""

from dataclasses import dataclass
from typing import Any

from jointfuse.train.engine import zero_stage

# DeepSpeed's own choices where a file says nothing.
BUCKET = 500_000_000  # elements
PERSISTENT = 100_000
PREFETCH = 50_000_000
WIRE_BYTES = {"fp16": 2, "bfp16": 2, "bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class ZeroFile:
    """A DeepSpeed file in numbers. Bytes are of one element."""

    stage: int
    precision: str  # fp32, bf16 or fp16: of the weights that the model computes with
    gradient: int  # bytes of an accumulated gradient
    wire: int  # bytes of a gradient on its way
    host_optimizer: bool
    host_weights: bool  # of stage 3
    buckets: int  # gradients wait in so many buffers ...
    bucket: int  # ... of so many elements
    persistent: int  # stage 3 keeps parameters of so many elements whole
    prefetch: int  # elements that stage 3 gathers beforehand

    @property
    def weight(self) -> int:
        """Bytes of a weight that the model computes with."""
        return 4 if self.precision == "fp32" else 2

    @property
    def keeps_whole_gradients(self) -> bool:
        """Stage 1 in bf16 with float32 sums is a class of its own in DeepSpeed: whole gradients, twice."""
        return self.stage == 1 and self.precision == "bf16" and self.gradient == 4 and not self.host_optimizer

    @property
    def compact(self) -> bool:
        """Stages 1 and 2 have a buffer of their part of the gradients alone only where its precision is another one;
        else each tensor that reaches into the part is kept as a whole."""
        return self.gradient == 4 and self.weight == 2


def zero_file(ds_config: dict[str, Any]) -> ZeroFile:
    zero = ds_config.get("zero_optimization", {})
    stage = zero_stage(ds_config)
    precision = next((kind for kind in ("fp16", "bf16") if ds_config.get(kind, {}).get("enabled")), "fp32")
    weight = 4 if precision == "fp32" else 2
    summed = ds_config.get("data_types", {}).get("grad_accum_dtype")
    overlaps = bool(zero.get("overlap_comm", stage == 3)) and bool(zero.get("contiguous_gradients", True))
    return ZeroFile(
        stage=stage,
        precision=precision,
        gradient=WIRE_BYTES.get(summed, weight),
        wire=WIRE_BYTES.get(ds_config.get("communication_data_type", ""), weight),
        host_optimizer=_on_host(zero.get("offload_optimizer")),
        host_weights=stage == 3 and _on_host(zero.get("offload_param")),
        buckets=2 if overlaps and stage in (1, 2) else 1,
        bucket=int(zero.get("reduce_bucket_size", BUCKET)),
        persistent=int(zero.get("stage3_param_persistence_threshold", PERSISTENT)),
        prefetch=int(zero.get("stage3_prefetch_bucket_size", PREFETCH)),
    )


def _on_host(offload: dict[str, Any] | None) -> bool:
    return bool(offload) and offload.get("device", "none") != "none"  # type: ignore[union-attr]
