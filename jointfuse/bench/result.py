"""The file a benchmark leaves: what was measured, on which device."""

import re
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from jointfuse.bench.device import device_name
from jointfuse.files import write_json


def file_safe(name: str) -> str:
    """Letters and digits, and a single dash for whatever stands between them."""
    return re.sub(r"[\W_]+", "-", name).strip("-")


def write_result(kind: str, figures: dict[str, Any], out: Path | None, console: Console) -> dict[str, Any]:
    """`figures`, device and torch version added, to `out` or build/bench/KIND-DEVICE.json."""
    result = {"device": device_name(), "torch": torch.__version__} | figures
    path = out or Path("build/bench") / f"{kind}-{file_safe(device_name())}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_json(path, result)
    console.print(f"written to {path}", highlight=False)
    return result
