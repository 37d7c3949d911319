"""DeepSpeed: its configuration from the recipe's, its optimiser, and a model's parameters gathered back from it."""

import contextlib
import hashlib
import io
import json
import os
import time
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from jointfuse.config import Config, TrainSettings
from jointfuse.errors import UserError
from jointfuse.train.quiet import deepspeed

if TYPE_CHECKING:  # a launcher divides a batch and needs no model
    from jointfuse.train.objective import Objective

PACKAGE = Path(__file__).resolve().parents[1]
DS_CONFIGS = (PACKAGE / "ds_configs", PACKAGE.parent / "ds_configs")
LONGEST_BUILD = 1800  # seconds
RECIPE_OWNS = {
    "train_batch_size": "train.batch",
    "train_micro_batch_size_per_gpu": "train.micro_batch",
    "gradient_accumulation_steps": "train.batch and train.micro_batch",
    "gradient_clipping": "train.clip",
    "optimizer": "train.optimizer, train.lr, train.betas, train.epsilon and train.weight_decay",
    "scheduler": "train.warmup and train.decay",
}


@dataclass(frozen=True)
class Division:
    """How a global batch is divided: batch = micro_batch x accumulation x ranks."""

    world_size: int
    micro_batch: int
    accumulation: int


def divide(settings: TrainSettings, world_size: int) -> Division:
    """Raises UserError where the global batch cannot be divided over the ranks."""
    if settings.batch % world_size:
        other = max(settings.batch // world_size, 1) * world_size
        raise UserError(
            f"train.batch = {settings.batch} cannot be divided over {world_size} ranks; set train.batch={other}, or "
            "another multiple"
        )
    a_rank = settings.batch // world_size
    micro = min(settings.micro_batch or a_rank, a_rank)
    if a_rank % micro:
        allowed = [n for n in range(1, a_rank + 1) if a_rank % n == 0]
        raise UserError(
            f"train.micro_batch = {micro}: each of {world_size} ranks holds {a_rank} utterances of train.batch = "
            f"{settings.batch}; micro_batch must be one of {', '.join(map(str, allowed))}"
        )
    return Division(world_size, micro, a_rank // micro)


def ds_config_path(name: str) -> Path:
    """ds_configs/NAME.json of the project, or a path to any JSON file. Raises UserError if there is none."""
    if name.endswith(".json"):
        return Path(name)
    for folder in DS_CONFIGS:
        if (folder / f"{name}.json").exists():
            return folder / f"{name}.json"
    raise UserError(
        f"train.deepspeed = '{name}': choose one of {', '.join(ds_config_names())}, or a path to a .json file"
    )


def ds_config_names() -> list[str]:
    """The shipped files."""
    return sorted(path.stem for folder in DS_CONFIGS for path in folder.glob("*.json"))


def read_ds_config(settings: TrainSettings) -> dict[str, Any]:
    """The DeepSpeed file of the recipe, as it is on disk.

    Raises:
        UserError: a missing or damaged file, or one that sets what the recipe owns.
    """
    path = ds_config_path(settings.deepspeed)
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"train.deepspeed: {path} cannot be read ({error.strerror})") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"train.deepspeed: {path} is not valid JSON ({error})") from error
    for key, owner in RECIPE_OWNS.items():
        if key in config:
            raise UserError(f"{path}: '{key}' belongs to the recipe ({owner}); remove it from the DeepSpeed file")
    return config


def zero_stage(ds_config: dict[str, Any]) -> int:
    return int(ds_config.get("zero_optimization", {}).get("stage", 0))


@dataclass(frozen=True)
class Layout:
    """What DeepSpeed's files of a checkpoint depend on; one that was written in another is converted (resize.py)."""

    world_size: int = 1
    stage: int = 0
    precision: str = "float32"  # or bf16, fp16
    files: str = ""  # digest of the DeepSpeed file and the kind of device, which choose between three Adams

    def __str__(self) -> str:
        return f"{self.world_size} rank{'s' if self.world_size > 1 else ''} ZeRO-{self.stage}"


def layout(ds_config: dict[str, Any], world_size: int) -> Layout:
    """The layout that checkpoints of so many ranks have on this machine."""
    half = [precision for precision in ("fp16", "bf16") if ds_config.get(precision, {}).get("enabled")]
    decisive = json.dumps([ds_config, deepspeed.accelerator.get_accelerator().device_name()], sort_keys=True)
    digest = hashlib.sha256(decisive.encode()).hexdigest()[:16]
    return Layout(world_size, zero_stage(ds_config), half[0] if half else "float32", digest)


def check_compile(settings: TrainSettings, stage: int) -> None:
    """Raises UserError where `train.compile` does not go with other settings."""
    if not settings.compile:
        return
    if stage == 3:
        raise UserError(
            "train.compile: under ZeRO-3 layers are never whole for long; choose a DeepSpeed file of stage 0 to 2"
        )
    if settings.checkpointing in ("attention", "layer"):
        raise UserError(
            f"train.compile: train.checkpointing = {settings.checkpointing} cannot see into compiled layers; "
            "choose none or block"
        )


def check_precision(ds_config: dict[str, Any], name: str) -> None:
    """Raises UserError where the machine's device cannot train in the file's precision."""
    accelerator = deepspeed.accelerator.get_accelerator()
    for precision, supported in (("fp16", accelerator.is_fp16_supported()), ("bf16", accelerator.is_bf16_supported())):
        if ds_config.get(precision, {}).get("enabled") and not supported:
            raise UserError(
                f"train.deepspeed = '{name}': this machine's device ({accelerator.device_name()}) cannot train in "
                f"{precision}; choose another file of ds_configs/"
            )


def parameter_groups(objective: "Objective", settings: TrainSettings) -> list[dict[str, Any]]:
    """Trainable parameters by part, each part's norms, biases and temperature apart, without weight decay."""
    groups: dict[tuple[str, bool], list[torch.nn.Parameter]] = defaultdict(list)
    names = {parameter: name for name, parameter in objective.named_parameters()}
    named = [(part, parameter) for part, _, parameter in objective.network.parts()]
    if objective.trained_temperature is not None:
        named.append(("temperature", objective.trained_temperature))
    for part, parameter in named:
        if parameter.requires_grad:
            # Under ZeRO-3 the shape is kept in ds_shape; here nothing is partitioned yet.
            decays = parameter.ndim > 1 and part != "temperature"
            groups[part, decays].append(parameter)
    if not groups:
        raise UserError("train.freeze: every part is frozen, nothing is left to train")
    return [
        {
            "params": parameters,
            "lr": settings.part_lr.get(part, settings.lr),  # type: ignore[call-overload]
            "weight_decay": settings.weight_decay if decays else 0.0,
            "part": part,
            # A checkpoint of stage 0 knows its Adam's parameters by their order alone.
            "names": [names[parameter] for parameter in parameters],
        }
        for (part, decays), parameters in groups.items()
    ]


def _optimizer(groups: list[dict[str, Any]], settings: TrainSettings, ds_config: dict[str, Any]) -> Any:
    common: dict[str, Any] = {"lr": settings.lr, "betas": settings.betas, "eps": settings.epsilon}
    decoupled = settings.optimizer == "adamw"
    if ds_config.get("zero_optimization", {}).get("offload_optimizer"):
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return DeepSpeedCPUAdam(groups, adamw_mode=decoupled, **common)
    if torch.cuda.is_available():
        from deepspeed.ops.adam import FusedAdam

        return FusedAdam(groups, adam_w_mode=decoupled, **common)
    kind = torch.optim.AdamW if decoupled else torch.optim.Adam
    return kind(groups, fused=True, **common)


def forget_dead_builds(extensions: Path) -> None:
    """A process killed while it compiled an extension leaves a lock for which every later one would wait for ever."""
    for lock in extensions.glob("*/lock"):
        with contextlib.suppress(OSError):  # another rank was first
            if time.time() - lock.stat().st_mtime > LONGEST_BUILD:
                lock.unlink()


def start_engine(objective: "Objective", config: Config, division: Division) -> Any:
    """A DeepSpeed engine around the objective; torch.distributed must be initialised.

    Raises:
        UserError: a DeepSpeed file that cannot be used.
    """
    settings = config.train
    ds_config = read_ds_config(settings)
    check_precision(ds_config, settings.deepspeed)
    ds_config |= {
        "train_batch_size": settings.batch,
        "train_micro_batch_size_per_gpu": division.micro_batch,
        "gradient_accumulation_steps": division.accumulation,
        "gradient_clipping": settings.clip,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    forget_dead_builds(Path(os.environ["TORCH_EXTENSIONS_DIR"]))
    optimizer = _optimizer(parameter_groups(objective, settings), settings, ds_config)
    if zero_stage(ds_config) == 0:
        optimizer.register_step_pre_hook(_skip_what_is_not_finite)
    rates = [group["lr"] for group in optimizer.param_groups]
    half = any(ds_config.get(precision, {}).get("enabled") for precision in ("fp16", "bf16"))
    wrapped = half and zero_stage(ds_config) == 0
    if wrapped:
        # DeepSpeed's wrapper for this case takes a step without gradients when it is made: at rate 0 no weight moves.
        for group in optimizer.param_groups:
            group["lr"] = 0.0
    with contextlib.redirect_stdout(io.StringIO()):  # every rank would print what it has built
        engine, *_ = deepspeed.initialize(model=objective, optimizer=optimizer, config=ds_config)
    if wrapped:
        for group, rate in zip(engine.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
        engine.optimizer.optimizer.state.clear()  # nor does Adam count that step
    return engine


def _skip_what_is_not_finite(optimizer: Any, *_: Any) -> None:
    """As DeepSpeed does in all its other optimizers: the step is none, and `overflow` says so."""
    gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
    norms = torch._foreach_norm(gradients)
    optimizer.overflow = bool(gradients) and not bool(torch.stack(norms).isfinite().all())
    if optimizer.overflow:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                parameter.grad = None


def forget_gradients(engine: Any) -> None:
    """After a step that the optimizer has refused: ZeRO-3 would find what was not finite again in the next one."""
    kept = getattr(engine.optimizer, "grad_partitions_flat_buffer", None)
    if kept is not None:
        kept.zero_()


def full_state(engine: Any) -> dict[str, torch.Tensor]:
    """The network's state dict on the CPU of rank 0, whole under every ZeRO stage; empty on other ranks.

    Every rank calls it. Parameters sharded by ZeRO-3 are gathered one at a time.
    """
    network = engine.module.network
    first = torch.distributed.get_rank() == 0
    state: dict[str, torch.Tensor] = {}
    for name, tensor in network.state_dict(keep_vars=True).items():
        with deepspeed.zero.GatheredParameters([tensor], enabled=hasattr(tensor, "ds_id")):
            if first:
                state[name] = tensor.detach().cpu().clone()
    return state
