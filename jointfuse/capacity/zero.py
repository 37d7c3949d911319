"""What a DeepSpeed file decides about memory and traffic."""

from dataclasses import dataclass

from jointfuse.train.deepspeed_file import DeepSpeedFile, Precision

BUCKET = 500_000_000  # elements, where DeepSpeed asks no file
WIRE_BYTES = {"fp16": 2, "bfp16": 2, "bf16": 2, "fp32": 4}


@dataclass(frozen=True)
class ZeroFile:
    """A DeepSpeed file in numbers. Bytes are of one element."""

    stage: int
    precision: Precision  # of the weights that the model computes with
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
        return 4 if self.precision == "float32" else 2

    @property
    def keeps_whole_gradients(self) -> bool:
        """Stage 1 in bf16 with float32 sums is a class of its own in DeepSpeed: whole gradients, twice."""
        return self.stage == 1 and self.precision == "bf16" and self.gradient == 4 and not self.host_optimizer

    @property
    def compact(self) -> bool:
        """Stages 1 and 2 have a buffer of their part of the gradients alone only where its precision is another one;
        else each tensor that reaches into the part is kept as a whole."""
        return self.gradient == 4 and self.weight == 2


def zero_file(file: DeepSpeedFile) -> ZeroFile:
    weight = 4 if file.precision == "float32" else 2
    return ZeroFile(
        stage=file.stage,
        precision=file.precision,
        gradient=WIRE_BYTES[file.gradient_sums] if file.gradient_sums else weight,
        wire=WIRE_BYTES[file.wire] if file.wire else weight,
        host_optimizer=file.offload_optimizer is not None,
        host_weights=file.stage == 3 and file.offload_param is not None,
        buckets=2 if file.overlaps and file.stage in (1, 2) else 1,
        bucket=file.bucket,
        persistent=file.persistent,
        prefetch=file.prefetch,
    )
