"""Jobs of several ranks on this machine, started by the DeepSpeed launcher, checked before they start."""

import os
import subprocess
import sys
from pathlib import Path

from jointfuse.config import Config
from jointfuse.ranks import USER_ERROR, free_port


def check_train(config: Config, run: Path, resume: bool, ranks: int) -> None:
    """What can be known to be wrong before any rank starts. Raises UserError."""
    from jointfuse.train.checkpoint import check_resumable, latest_checkpoint
    from jointfuse.train.engine import check_precision, divide, read_ds_config
    from jointfuse.train.loop import open_corpus
    from jointfuse.train.run_folder import check_run_folder

    check_run_folder(run, resume)
    divide(config.train, ranks)
    check_precision(read_ds_config(config.train), config.train.deepspeed)
    corpus = open_corpus(config)
    checkpoint = latest_checkpoint(run) if resume else None
    if checkpoint:
        check_resumable(checkpoint, config, ranks, corpus)
    for split in ("train", "dev"):
        corpus.split(split)


def launch_training(recipe: str, overrides: list[str], run: Path, resume: bool, ranks: int, brief: bool = False) -> int:
    """Train on `ranks` ranks of this machine. Returns the exit status."""
    options = [
        "--recipe",
        recipe,
        "--run",
        str(run),
        *(["--resume"] if resume else []),
        *(["--brief"] if brief else []),
    ]
    status = launch("jointfuse.train", [*options, *overrides], ranks)
    if not status and not (run / "finished").exists():
        # DeepSpeed's launcher answers 0 when the process that watches the ranks was killed.
        print(f"error: {run}: the launcher was killed before the run ended; go on with --resume", file=sys.stderr)
        return 1
    return status


def launch_evaluation(run: Path, split: str, corpus: str | None, ranks: int) -> int:
    """Evaluate on `ranks` ranks of this machine. Returns the exit status."""
    options = ["--split", split, *(["--corpus", corpus] if corpus else [])]
    return launch("jointfuse.evaluate", [str(run), *options], ranks)


def launch(module: str, arguments: list[str], ranks: int) -> int:
    """`python -m MODULE ARGUMENTS` as `ranks` ranks of this machine.

    Returns:
        The exit status: 0, 2 for a user's mistake, anything else for a fault.
    """
    import torch

    environment = dict(os.environ)
    environment.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    if not torch.cuda.is_available():
        environment.setdefault("DS_ACCELERATOR", "cpu")
    # The launcher looks for ninja and for itself on the PATH, where a virtual environment that is not active is not.
    scripts = Path(sys.executable).parent
    environment["PATH"] = f"{scripts}{os.pathsep}{environment.get('PATH', '')}"
    command = [
        *(sys.executable, str(scripts / "deepspeed"), "--num_gpus", str(ranks)),
        *("--master_addr", "127.0.0.1", "--master_port", str(free_port())),
        *("--log_level", "critical", "--module", module, *arguments),
    ]
    status = subprocess.run(command, env=environment, check=False).returncode
    if status not in (0, 1, USER_ERROR):  # those ranks have said why
        print(
            f"error: a rank of {module} was killed (exit status {status}); if memory ran out, use more ranks or a "
            f"smaller train.micro_batch",
            file=sys.stderr,
        )
    return status
