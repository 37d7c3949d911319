"""DeepSpeed: its configuration from the recipe's, its optimiser, and a model's parameters gathered back from it."""

import contextlib
import hashlib
import io
import json
import os
import time
from collections import defaultdict
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from jointfuse.config import Config, TrainSettings
from jointfuse.errors import UserError
from jointfuse.train.deepspeed_file import DeepSpeedFile, read_deepspeed_file
from jointfuse.train.quiet import deepspeed

if TYPE_CHECKING:  # a launcher divides a batch and needs no model
    from jointfuse.train.objective import Objective

LONGEST_BUILD = 1800  # seconds


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


@dataclass(frozen=True)
class Layout:
    """What DeepSpeed's files of a checkpoint depend on; one that was written in another is converted (resize.py)."""

    world_size: int = 1
    stage: int = 0
    precision: str = "float32"  # or bf16, fp16
    files: str = ""  # digest of the DeepSpeed file and the kind of device, which choose between three Adams

    def __str__(self) -> str:
        return f"{self.world_size} rank{'s' if self.world_size > 1 else ''} ZeRO-{self.stage}"


def layout(file: DeepSpeedFile, world_size: int) -> Layout:
    """The layout that checkpoints of so many ranks have on this machine."""
    decisive = json.dumps([file.content, deepspeed.accelerator.get_accelerator().device_name()], sort_keys=True)
    digest = hashlib.sha256(decisive.encode()).hexdigest()[:16]
    return Layout(world_size, file.stage, file.precision, digest)


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


def check_precision(file: DeepSpeedFile) -> None:
    """Raises UserError where the machine's device cannot train in the file's precision."""
    accelerator = deepspeed.accelerator.get_accelerator()
    able = {"fp16": accelerator.is_fp16_supported, "bf16": accelerator.is_bf16_supported}
    if file.precision != "float32" and not able[file.precision]():
        raise UserError(
            f"train.deepspeed = '{file.name}': this machine's device ({accelerator.device_name()}) cannot train in "
            f"{file.precision}; choose another file of ds_configs/"
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


def choose_adam(file: DeepSpeedFile, decoupled: bool) -> partial[Any]:
    """The Adam, or the AdamW, for where the optimizer is kept."""
    if file.offload_optimizer:
        from deepspeed.ops.adam import DeepSpeedCPUAdam

        return partial(DeepSpeedCPUAdam, adamw_mode=decoupled)
    if torch.cuda.is_available():
        from deepspeed.ops.adam import FusedAdam

        return partial(FusedAdam, adam_w_mode=decoupled)
    return partial(torch.optim.AdamW if decoupled else torch.optim.Adam, fused=True)


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
    file = read_deepspeed_file(settings)
    check_precision(file)
    ds_config = file.content | {
        "train_batch_size": settings.batch,
        "train_micro_batch_size_per_gpu": division.micro_batch,
        "gradient_accumulation_steps": division.accumulation,
        "gradient_clipping": settings.clip,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "steps_per_print": 10**9,
    }
    forget_dead_builds(Path(os.environ["TORCH_EXTENSIONS_DIR"]))
    adam = choose_adam(file, decoupled=settings.optimizer == "adamw")
    groups = parameter_groups(objective, settings)
    optimizer = adam(groups, lr=settings.lr, betas=settings.betas, eps=settings.epsilon)
    if file.stage == 0:
        optimizer.register_step_pre_hook(_skip_what_is_not_finite)
    rates = [group["lr"] for group in optimizer.param_groups]
    wrapped = file.precision != "float32" and file.stage == 0
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
