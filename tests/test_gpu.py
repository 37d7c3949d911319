"""The kernels that a process on a GPU chooses."""

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.distributed import distributed_c10d

from jointfuse import ranks
from jointfuse.config import load_config
from jointfuse.data.mel import filters
from jointfuse.evaluate import run

pytestmark = pytest.mark.required


def test_a_rank_on_a_gpu_chooses_its_kernels(monkeypatch: pytest.MonkeyPatch) -> None:
    cudnn, precision = torch.backends.cuda.cudnn_sdp_enabled(), torch.get_float32_matmul_precision()
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "set_device", lambda _: None)
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda *_, **__: None)
    monkeypatch.setattr(distributed_c10d, "default_pg_timeout", None)
    monkeypatch.setattr(distributed_c10d, "default_pg_nccl_timeout", None)
    monkeypatch.setattr(ranks, "leave", lambda _: None)
    chosen: list[tuple[bool, str]] = []

    def work() -> bool:
        ranks.join(600)
        chosen.append((torch.backends.cuda.cudnn_sdp_enabled(), torch.get_float32_matmul_precision()))
        return True

    try:
        ranks.rank_main(work)
    finally:
        torch.backends.cuda.enable_cudnn_sdp(cudnn)
        torch.set_float32_matmul_precision(precision)
    assert chosen == [(False, "high")]


def test_an_evaluation_on_a_gpu_chooses_its_kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    network = SimpleNamespace(cuda=lambda: order.append("moved"))
    model = SimpleNamespace(network=network, config=load_config("demo", []), labels=[], info={})
    monkeypatch.setattr(run, "load_model", lambda _: model)
    opened = SimpleNamespace(settings=None, corpus=SimpleNamespace(split=lambda _: None))
    monkeypatch.setattr(run, "open_scored", lambda *_: opened)
    monkeypatch.setattr(run, "choose_kernels", lambda: order.append("chosen"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    (tmp_path / "best").mkdir()
    with pytest.raises(AttributeError):  # there is no network any more
        run.evaluate_run(tmp_path, "dev")
    assert order == ["chosen", "moved"]


def test_a_log_mel_stays_within_a_thousandth_where_tensor_cores_multiply() -> None:
    """They round both factors to 10 bits behind the leading one."""

    def rounded(x: torch.Tensor) -> torch.Tensor:
        return ((x.view(torch.int32) + 0x1000) & ~0x1FFF).view(torch.float32)

    triangles = torch.from_numpy(filters())
    power = torch.randn(200, len(triangles), generator=torch.Generator().manual_seed(0)).mul(4).exp()
    exact, by_cores = (a @ b for a, b in ((power, triangles), (rounded(power), rounded(triangles))))
    assert (by_cores.log() - exact.log()).abs().max() < 0.001
