"""DeepSpeed, which reads its environment when it is imported: whoever wants it takes it from here."""

import logging
import os
import sys
from pathlib import Path

import torch

# It compiles extensions on first use: once, beside the interpreter they are for.
os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(Path(sys.prefix) / "torch_extensions"))
if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
# A rank is asked for its warnings, not for its biography.
os.environ.setdefault("DS_LOG_LEVEL", "warning")
logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)

import deepspeed  # noqa: E402

logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
# Its all-reduce for inference on CPUs: training never calls it, yet it is compiled, and every rank of every run leaves
# 66 MiB of it in /dev/shm.
deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
