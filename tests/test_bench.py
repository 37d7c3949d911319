"""Benchmarks run, compare equal things, and say what they cannot measure."""

import json
import re
import sys
from pathlib import Path

import pytest
import torch
from distributed import run_program
from rich.console import Console
from training_fixtures import corpus, recipe

from jointfuse.bench import block, build, data, icl, plan, step
from jointfuse.bench.device import held_bytes, peak_bytes
from jointfuse.bench.result import file_safe
from jointfuse.errors import UserError

__all__ = ["corpus", "recipe"]

BENCH = [sys.executable, "-m", "jointfuse.bench", "icl"]


def test_a_table_and_a_result_file_name_the_device_and_every_method(tmp_path: Path) -> None:
    only = [part for m in icl.METHODS if "compile" not in m.name for part in ("--only", m.name)]
    out = tmp_path / "folder" / "result.json"
    sizes = ["--rows", "64", "--rows", "96", "--width", "24", "--repeats", "2"]
    ended = run_program([*BENCH, *sizes, *only, "--dtype", "float32", "--out", str(out)])
    assert ended.returncode == 0, ended.stderr
    result = json.loads(out.read_text())
    assert result["device"] in ended.stdout
    assert result["matmul_flops"] > 0
    assert [(cell["rows"], cell["width"]) for cell in result["cells"][:: len(only) // 2]] == [(64, 24), (96, 24)]
    for cell in result["cells"]:
        assert cell["method"] in ended.stdout
        # inf-cl has a note even where it runs.
        assert cell["method"] == "inf-cl" or (cell["seconds"] is None) == bool(cell["note"]), cell
        if cell["seconds"]:
            flops = 6 * cell["rows"] ** 2 * cell["width"] / cell["seconds"]
            assert cell["share_of_matmul"] == pytest.approx(flops / result["matmul_flops"])
    if not torch.cuda.is_available():
        assert {cell["note"] for cell in result["cells"] if cell["method"] == "inf-cl"} == {"needs a GPU"}


@pytest.mark.skipif(torch.cuda.is_available(), reason="as many GPUs as ranks would be needed")
def test_over_ranks_ours_sends_features_once_and_the_peer_sends_their_gradients_back(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    ended = run_program([*BENCH, "--rows", "64", "--width", "24", "--ranks", "2", "--repeats", "1", "--out", str(out)])
    assert ended.returncode == 0, ended.stderr
    cells = {cell["method"]: cell for cell in json.loads(out.read_text())["cells"]}
    tiled, peer = cells["jointfuse tiled"], cells["dense torch, gathered with gradient"]
    features = 32 * 24 * 4
    assert tiled["sent_forward"] == 5 * 8 + features + 32 * 8 + 32 * 4
    assert tiled["sent_backward"] == 0
    assert peer["sent_backward"] >= features


def test_the_block_is_timed_beside_its_literal_form_once_they_agree(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    sizes = ["--batch", "2", "--patches", "12", "--tokens", "5", "--width", "64", "--repeats", "1"]
    ended = run_program([*BENCH[:-1], "block", *sizes, "--out", str(out)])
    assert ended.returncode == 0, ended.stderr
    result = json.loads(out.read_text())
    assert result["sizes"] == {"batch": 2, "patches": 12, "tokens": 5, "width": 64, "joint_vectors": 4}
    assert len(result["cases"]) == 4
    for case in result["cases"]:
        assert case["case"] in ended.stdout
        assert case["ratio"] == pytest.approx(case["literal"] / case["ours"])
        assert case["difference"] < 1e-5


def test_a_block_that_computes_something_else_is_not_timed() -> None:
    ours, literal = block._stacks(64, 2, torch.float32)
    with torch.no_grad():
        literal[1].u[0, 0] += 0.1
    given = block._inputs(2, 9, 5, 64, torch.float32)
    inner, stack = block._cases(ours, literal, given["t_mask"], given["m_mask"])
    block._check_equal(inner, given["t"], given["m"], torch.float32)
    with pytest.raises(UserError, match=r"two blocks to \[CLS\]: the two forms differ by"):
        block._check_equal(stack, given["t"], given["m"], torch.float32)


@pytest.mark.parametrize(
    ("option", "message"),
    [(["--width", "100"], "--width 100: it must be a multiple of 64"), (["--dtype", "int8"], "--dtype int8: choose")],
)
def test_sizes_the_block_cannot_have_are_one_line(option: list[str], message: str) -> None:
    ended = run_program([*BENCH[:-1], "block", *option])
    assert ended.returncode == 2
    assert message in ended.stderr
    assert ended.stderr.count("\n") == 1


def test_a_step_is_timed_beside_the_plain_model_that_loses_the_same(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    # Weight decay, rates of single parts, several steps: the plain model must follow all of it.
    settings = ["loss.train_temperature=false", "train.batch=8", "train.optimizer=adamw", "train.weight_decay=0.1"]
    trace = tmp_path / "trace.json"
    command = [*BENCH[:-1], "step", "--recipe", str(recipe), "--steps", "4", "--out", str(out), "--profile", str(trace)]
    ended = run_program([*command, *settings, "train.part_lr={heads: 1.0e-2}", "train.lr=1e-3"])
    assert ended.returncode == 0, ended.stderr
    result = json.loads(out.read_text())
    assert len(result["ours_losses"]) == 5
    assert result["largest_difference"] < 1e-4
    assert abs(result["ours_losses"][0] - result["ours_losses"][-1]) > 0.01
    assert result["ratio"] == pytest.approx(result["plain_seconds"] / result["ours_seconds"])
    assert result["random_order_ratio"] > 0
    assert 0 <= result["share_of_data_wait"] < 1
    assert result["share_of_matmul"] > 0
    assert result["ours_peak_bytes"] is None or result["ours_peak_bytes"] > 0
    assert any(event.get("name") == "aten::addmm" for event in json.loads(trace.read_text())["traceEvents"])


def test_every_mode_of_checkpointing_is_timed_and_weighed(recipe: Path, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    command = [*BENCH[:-1], "checkpointing", "--recipe", str(recipe), "--steps", "1", "--out", str(out)]
    ended = run_program(command)
    assert ended.returncode == 0, ended.stderr
    modes = json.loads(out.read_text())["modes"]
    assert list(modes) == ["none", "block", "attention", "layer"]
    for mode, found in modes.items():
        assert mode in ended.stdout
        assert found["seconds"] > 0
        assert found["peak_bytes"] is None or found["peak_bytes"] >= 0


def test_the_stream_is_timed_beside_decoding_alone_and_webdataset(recipe: Path, corpus: Path, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    console = Console(record=True, width=130)
    result = data.benchmark_data(corpus, 8, [0, 1], 1, out, console)
    assert json.loads(out.read_text()) == result
    ways = [f"{name}, {number} workers" for number in (0, 1) for name in ("jointfuse", "webdataset")]
    assert list(result["seconds"]) == ["reading the bytes", "decoding alone", *ways]
    assert all(taken > 0 for taken in result["seconds"].values())
    assert result["formats"]["WAV"]["bytes_a_second"] > result["formats"]["FLAC"]["bytes_a_second"] > 0
    printed = console.export_text()
    assert all(way in printed for way in ways)
    with pytest.raises(UserError, match=r"--batch 64: .* has 43 utterances to train on"):
        data.benchmark_data(corpus, 64, None, 1, out, console)


def test_a_plan_of_any_size_is_timed_to_its_end(tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    console = Console(record=True, width=130)
    result = plan.benchmark_plan(5003, 70, 64, out, console)
    assert json.loads(out.read_text()) == result
    assert result["epoch_seconds"] > 0
    assert "5,003 utterances in 70 shards, batches of 64" in console.export_text()
    with pytest.raises(UserError, match="--shards 9: there are 5 utterances"):
        plan.benchmark_plan(5, 9, 1, out, console)


@pytest.mark.parametrize("media", ["mp4", "wav"])
def test_a_build_is_timed_beside_its_floor_and_its_memory_is_told(media: str, tmp_path: Path) -> None:
    out = tmp_path / "result.json"
    console = Console(record=True, width=130)
    result = build.benchmark_build(40, 0.5, 8000, media, 1, 2, out, console)
    assert json.loads(out.read_text()) == result
    assert result["clips"] == 40
    assert list(result["floors"]) == ["decode + encode", "decode + encode + mel"]
    for floor in result["floors"].values():
        assert floor["ratio"] == pytest.approx(result["ours"]["clips_a_second"] / floor["clips_a_second"])
    assert result["ours"]["clips_a_second"] == pytest.approx(80 / sum(result["seconds_of_builds"]))
    assert [len(seconds) for seconds in result["seconds_of_loops"].values()] == [3, 3]
    assert result["bytes_at_the_end"] is None or result["bytes_at_the_end"] > 2**20
    printed = console.export_text()
    assert f"40 clips of 0.5 s at 8,000 Hz ({media}), 1 processes" in printed
    assert "floor: decode + encode + mel" in printed


def test_what_a_graph_holds_is_weighed() -> None:
    size = 64 * 2**20
    weight = torch.ones(size // 4, requires_grad=True)
    held = held_bytes(lambda: (weight * 2).exp().sum())
    assert held is None or 0.9 * size < held < 1.5 * size


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("model.modality=text", "model.modality = text: the plain model is written for both"),
        ("train.deepspeed=zero3", "train.deepspeed: the plain model is made of whole parameters"),
        ("train.batch=64", "train.batch = 64: the corpus has 43 utterances to train on"),
        ("train.micro_batch=1", "train.micro_batch: the plain model knows no gradient accumulation"),
    ],
)
def test_settings_the_plain_model_does_not_know_are_refused(setting: str, message: str, recipe: Path) -> None:
    with pytest.raises(UserError, match=re.escape(message)):
        step.benchmark_step(str(recipe), ["loss.train_temperature=false", setting], 2, 2, None, None, Console())


def test_a_method_with_other_results_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = icl.Method("wrong", lambda: lambda f, y: 1.1 * icl.dense_loss(f, y))
    with pytest.raises(UserError, match=r"wrong: its loss differs from the reference by 1\.0e-01"):
        icl._measure([wrong], 64, 8, torch.float32, 1)


def test_what_does_not_fit_or_is_not_installed_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent() -> icl.Loss:
        raise ImportError("no", name="peer")

    monkeypatch.setattr(icl, "_fits", lambda k: False)
    methods = [icl.Method("absent", absent), icl.Method("large", lambda: icl.dense_loss, dense=True)]
    first, second = icl._measure(methods, 64, 8, torch.float32, 1)
    assert first.note == "peer is not installed: pip install 'jointfuse[bench]'"
    assert second.note == "64 x 64 similarities do not fit"
    assert first.seconds is second.seconds is None


def test_peak_memory_is_that_of_the_work() -> None:
    size = 64 * 2**20
    used = peak_bytes(lambda: torch.ones(size, dtype=torch.uint8).max())
    assert used is None or 0.9 * size < used < 1.5 * size


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dtype", "float8"], "--dtype float8: choose one of auto, float32, bfloat16, float16"),
        (["--only", "faster"], "--only 'faster': choose among jointfuse tiled"),
        (["--rows", "65", "--ranks", "2"], "--rows must be multiples of --ranks 2"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(arguments: list[str], message: str) -> None:
    ended = run_program([*BENCH, *arguments])
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"error: {message}")
    assert len(ended.stderr.strip().splitlines()) == 1


@pytest.mark.parametrize(
    ("device", "name"),
    [
        ("AMD EPYC-, 2 threads", "AMD-EPYC-2-threads"),
        ("AMD EPYC, 2 threads", "AMD-EPYC-2-threads"),
        ("NVIDIA H100 80GB HBM3", "NVIDIA-H100-80GB-HBM3"),
        ("-Intel(R) Xeon(R) @ 2.2 GHz -", "Intel-R-Xeon-R-2-2-GHz"),
    ],
)
def test_a_device_has_one_dash_between_words_and_none_around_them(device: str, name: str) -> None:
    assert file_safe(device) == name


def test_the_results_that_are_there_have_names_that_a_device_gives() -> None:
    for path in (Path(icl.__file__).parent / "results").iterdir():
        assert file_safe(path.stem) == path.stem
