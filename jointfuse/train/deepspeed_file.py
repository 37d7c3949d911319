"""The DeepSpeed file that `train.deepspeed` names: stage, precision and offload, read in one place."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import BaseModel, ConfigDict, Field, StrictBool, model_validator

from jointfuse.config import TrainSettings
from jointfuse.errors import UserError
from jointfuse.files import read_json

PACKAGE = Path(__file__).resolve().parents[1]
FOLDERS = (PACKAGE / "ds_configs", PACKAGE.parent / "ds_configs")
WAY_OUT = "train.deepspeed names a file of ds_configs/ or a path to your own"
RECIPE_OWNS = {
    "train_batch_size": "train.batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.batch and train.micro_batch",
    "gradient_clipping": "train.clip",
    "optimizer": "train.optimizer, train.lr, train.betas, train.epsilon and train.weight_decay",
    "scheduler": "train.warmup and train.decay",
}
OLD_NAMES = {
    "cpu_offload": 'offload_optimizer: {"device": "cpu"}',
    "cpu_offload_param": 'offload_param: {"device": "cpu"}',
}
NATIVE_BF16 = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")  # as torch names what a CPU can do

Precision = Literal["float32", "bf16", "fp16"]
Offload = Literal["cpu", "nvme"]
Elements = Annotated[int, Field(ge=0)]


class _Section(BaseModel):
    """What jointfuse reads of a section; the rest of it is DeepSpeed's to check."""

    model_config = ConfigDict(extra="allow")


class _Offload(_Section):
    device: Literal["none", "cpu", "nvme"] = "none"


class _Zero(_Section):
    # The numbers are DeepSpeed's own choices where a file says nothing.
    stage: Literal[0, 1, 2, 3] = 0
    offload_optimizer: _Offload | None = None
    offload_param: _Offload | None = None
    overlap_comm: StrictBool | None = None
    contiguous_gradients: StrictBool = True
    reduce_bucket_size: Elements = 500_000_000
    stage3_param_persistence_threshold: Elements = 100_000
    stage3_prefetch_bucket_size: Elements = 50_000_000

    @model_validator(mode="before")
    @classmethod
    def _names_are_todays(cls, content: Any) -> Any:
        for old, new in OLD_NAMES.items() if isinstance(content, dict) else ():
            if old in content:
                raise ValueError(f"'{old}' is an old name; write {new}")
        return content


class _Half(_Section):
    enabled: StrictBool = False


class _DataTypes(_Section):
    grad_accum_dtype: Literal["fp32", "fp16", "bf16", "bfp16"] | None = None


class _Content(_Section):
    zero_optimization: _Zero = _Zero()
    fp16: _Half = _Half()
    bf16: _Half = _Half()
    data_types: _DataTypes = _DataTypes()
    communication_data_type: Literal["fp32", "fp16", "bf16", "bfp16"] | None = None

    @model_validator(mode="before")
    @classmethod
    def _names_are_todays(cls, content: Any) -> Any:
        if isinstance(content, dict) and "bfloat16" in content:
            raise ValueError("'bfloat16' is an old name; write bf16")
        return content

    @model_validator(mode="after")
    def _one_precision(self) -> Self:
        if self.fp16.enabled and self.bf16.enabled:
            raise ValueError("fp16 and bf16 are both enabled; enable one of them")
        return self


@dataclass(frozen=True)
class DeepSpeedFile:
    """What a DeepSpeed file decides. Sizes are numbers of elements.

    Attributes:
        name: as `train.deepspeed` has it.
        content: as it is on disk.
        gradient_sums: the precision of accumulated gradients, as DeepSpeed names it; None: the weights'.
        wire: the precision of gradients on their way, likewise.
        overlaps: a bucket is sent while the next one is filled.
    """

    name: str
    content: dict[str, Any]
    stage: int
    precision: Precision
    offload_optimizer: Offload | None
    offload_param: Offload | None
    gradient_sums: str | None
    wire: str | None
    overlaps: bool
    bucket: int
    persistent: int
    prefetch: int

    @property
    def on_nvme(self) -> bool:
        return "nvme" in (self.offload_optimizer, self.offload_param)

    @property
    def float32_file(self) -> str | None:
        """The shipped file that differs from this one in precision alone."""
        twin = self.name.removesuffix(f"_{self.precision}")
        return twin if twin in deepspeed_file_names() else None


def deepspeed_file_path(name: str) -> Path:
    """ds_configs/NAME.json of the project, or a path to any JSON file. Raises UserError if there is none."""
    if name.endswith(".json"):
        return Path(name)
    for folder in FOLDERS:
        if (folder / f"{name}.json").exists():
            return folder / f"{name}.json"
    raise UserError(
        f"train.deepspeed = '{name}': choose one of {', '.join(deepspeed_file_names())}, or a path to a .json file"
    )


def deepspeed_file_names() -> list[str]:
    """The shipped files."""
    return sorted(path.stem for folder in FOLDERS for path in folder.glob("*.json"))


def read_deepspeed_file(settings: TrainSettings) -> DeepSpeedFile:
    """The DeepSpeed file of a recipe.

    Raises:
        UserError: a missing or damaged file, a value of another kind, or one that sets what the recipe owns.
    """
    path = deepspeed_file_path(settings.deepspeed)
    content = read_json(path, dict[str, Any], WAY_OUT)
    for key, owner in RECIPE_OWNS.items():
        if key in content:
            raise UserError(f"{path}: '{key}' belongs to the recipe ({owner}); remove it from the DeepSpeed file")
    checked = read_json(path, _Content, WAY_OUT)
    zero = checked.zero_optimization
    overlaps = zero.stage == 3 if zero.overlap_comm is None else zero.overlap_comm
    return DeepSpeedFile(
        name=settings.deepspeed,
        content=content,
        stage=zero.stage,
        precision="fp16" if checked.fp16.enabled else "bf16" if checked.bf16.enabled else "float32",
        offload_optimizer=_device(zero.offload_optimizer),
        offload_param=_device(zero.offload_param),
        gradient_sums=checked.data_types.grad_accum_dtype,
        wire=checked.communication_data_type,
        overlaps=overlaps and zero.contiguous_gradients,
        bucket=zero.reduce_bucket_size,
        persistent=zero.stage3_param_persistence_threshold,
        prefetch=zero.stage3_prefetch_bucket_size,
    )


def _device(offload: _Offload | None) -> Offload | None:
    return None if offload is None or offload.device == "none" else offload.device


def has_native_bf16() -> bool:
    """Whether this machine's CPU has instructions for bf16; else every product is computed by way of float32."""
    able = torch.cpu.get_capabilities()
    return any(able.get(name) for name in NATIVE_BF16)


def slow_precision(file: DeepSpeedFile, device: str) -> str:
    """What is to be said before a training on such a device begins; empty where nothing is."""
    if file.precision != "bf16" or device != "cpu" or has_native_bf16():
        return ""
    other = f"train.deepspeed={file.float32_file}" if file.float32_file else "a DeepSpeed file without bf16"
    return (
        f"train.deepspeed = '{file.name}': this CPU has no instructions for bf16, which is some twenty times slower "
        f"here than float32; choose {other}"
    )
