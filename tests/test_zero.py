import json
from pathlib import Path

import pytest
from distributed import run_ranks
from training_fixtures import Trained, corpus, recipe, train

__all__ = ["corpus", "recipe"]
STAGES = (0, 1, 2, 3)

def stage_file(stage: int, folder: Path) -> Path:
    from jointfuse.train.engine import ds_config_path

    settings = json.loads(ds_config_path(f"zero{stage}").read_text(encoding="utf-8"))
    if stage == 3:
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    path = folder / f"stage{stage}.json"
    path.write_text(json.dumps(settings), encoding="utf-8")
    return path


def every_stage(recipe: Path, files: dict[int, Path], folder: Path) -> dict[int, Trained]:
    import time
    out = {}
    for stage, file in files.items():
        for extra in ([], ["train.checkpointing=true"]):
            t = time.time()
            out[stage, len(extra)] = train(recipe, folder / f"zero{stage}{len(extra)}", f"train.deepspeed={file}", *extra)
            print("TIME", stage, extra, time.time() - t, flush=True)
    return out


@pytest.fixture(scope="module")
def runs(recipe: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[int, Trained]:
    folder = tmp_path_factory.mktemp("zero")
    files = {stage: stage_file(stage, folder) for stage in STAGES}
    return run_ranks(2, every_stage, folder / "ranks", recipe, files, folder)[0]

def test_all(runs):
    import numpy as np
    from training_fixtures import largest_difference
    ref = runs[0, 0]
    print(ref.losses)
    for k, r in runs.items():
        print(k, np.abs(r.losses - ref.losses).max(0), np.abs(r.losses - ref.losses).max(1), largest_difference(r.weights, ref.weights), largest_difference(r.weights, ref.weights, ("key.bias","qkv.bias")))
