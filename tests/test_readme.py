"""The README's commands run as they stand, on a small table and with few steps."""

import itertools
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from corpus_helpers import write_clip
from pace import stretched
from release_fixtures import make_iemocap, make_ravdess
from training_fixtures import RECIPE, SIZES, make_corpus

from jointfuse.data.corpora.iemocap_counts import PUBLISHED

PROJECT = Path(__file__).resolve().parents[1]
README = (PROJECT / "README.md").read_text(encoding="utf-8")
FEW = "train.steps=2 train.evaluate_every='2 steps' train.save_every='2 steps' data.workers=0"
TINY = f"--recipe tiny.yaml {FEW}"

# What is put in the place of a piece of a command, so that it ends within seconds; the rest runs as written.
SHORTER = {
    "python tools/build_shards.py table all.csv --out corpora/mine": {},
    "python tools/verify_shards.py corpora/mine": {},
    "python tools/build_shards.py meld MELD.Raw --out corpora/meld": {"corpora/meld": "corpora/meld --text-only"},
    "python tools/build_shards.py iemocap IEMOCAP_full_release --out corpora/iemocap": {
        "corpora/iemocap": "corpora/iemocap --partial"  # a clip a dialogue
    },
    "python tools/build_shards.py ravdess RAVDESS --out corpora/ravdess": {},
    "python tools/build_shards.py files crema-d.yaml AudioWAV --out corpora/crema-d": {},
    "python tools/shard_stats.py corpora/mine --page corpora/mine.html": {},
    "jointfuse train --recipe small --run runs/mine --ranks 2 data.corpus=corpora/mine": {"--recipe small": TINY},
    "jointfuse eval runs/mine --split test": {},
    "jointfuse eval runs/mine --corpus corpora/ravdess data.labels='{happy: joy, sad: sadness, angry: anger, "
    "fearful: fear, surprised: surprise, calm: null}'": {
        "sad: sadness": "sad: null",
        "surprised: surprise": "neutral: null, disgust: null, surprised: null",
    },
    "jointfuse train --recipe small --run runs/local --ranks 2 data.corpus=corpora/mine "
    "model.text_encoder.weights=models/minilm model.language.weights=models/minilm "
    "model.vision.weights=models/dinov2-small": {"--recipe small": f"--recipe small {FEW} data.max_seconds=1"},
    "deepspeed --num_gpus 2 --module jointfuse.train --recipe demo --run runs/demo data.corpus=corpora/demo": {
        "--recipe demo": f"--recipe demo {FEW}",
    },
    "jointfuse doctor --run runs/cluster --ranks 2": {},
    "python -m jointfuse.bench icl": {
        "bench icl": "bench icl --rows 64 --width 16 --repeats 1 --only 'jointfuse tiled' --only 'dense torch'"
    },
    "python -m jointfuse.bench block": {"bench block": "bench block --patches 9 --width 64 --repeats 1"},
    "python -m jointfuse.bench data --corpus corpora/demo": {"bench data": "bench data --repeats 1 --workers 1"},
    "python -m jointfuse.bench plan --utterances 100000000 --shards 100000": {
        "--utterances 100000000 --shards 100000": "--utterances 10000 --shards 100"
    },
    "jointfuse plan --recipe paper-large --nodes 128 --gpus-per-node 8 --tflops 700 --bandwidth 25": {
        "--recipe paper-large": "--recipe tiny.yaml data.corpus=corpora/mine",
    },
    "python -m jointfuse.bench build": {"bench build": "bench build --clips 20"},
}
# .ci/run runs the first two as they are, and the third within the first, with another recipe and one seed.
IN_CI = [
    "bash tools/quickstart.sh",
    "bash tools/test.sh",
    "jointfuse compare --recipe small --seeds 3 --ranks 2 --out runs/compare data.corpus=corpora/mine",
]
IN_TEST_BENCH = [
    f"python -m jointfuse.bench {one} --recipe demo data.corpus=corpora/demo" for one in ("step", "checkpointing")
]


def commands() -> list[str]:
    blocks = re.findall(r"```bash\n(.*?)```", README, flags=re.DOTALL)
    return [
        re.sub(r"\s+", " ", line).strip()
        for block in blocks
        for line in block.replace("\\\n", " ").splitlines()
        if line.strip()
    ]


def test_every_command_of_the_readme_is_run_here_or_in_ci() -> None:
    here_or_in_ci = [command for command in commands() if not command.startswith("sbatch ")]
    assert sorted(here_or_in_ci) == sorted([*IN_CI, *IN_TEST_BENCH, *SHORTER]), (
        "those of sbatch are in test_slurm_scripts.py"
    )
    script = (PROJECT / ".ci" / "run").read_text(encoding="utf-8")
    assert all(command in script for command in IN_CI[:2])
    assert "\njointfuse compare --recipe demo" in (PROJECT / "tools" / "quickstart.sh").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory, shared: Path) -> Path:
    """A folder as the README has it: tools, a table with its clips, published corpora, pretrained models, a demo."""
    folder = tmp_path_factory.mktemp("desk")
    (folder / "tools").symlink_to(PROJECT / "tools")
    (folder / "models").symlink_to(shared / "models")
    (folder / "MELD.Raw").symlink_to(shared / "data" / "meld")
    source = folder / "source"
    made = make_corpus(source)
    lines = []
    for split in SIZES:
        header, *rows = (source / f"{split}.csv").read_text(encoding="utf-8").splitlines()
        lines += [f"{row},{split}" for row in rows]
    (folder / "all.csv").write_text("\n".join([f"{header},split", *lines]) + "\n", encoding="utf-8")
    (folder / "wav").symlink_to(source / "wav")
    (folder / "corpora").mkdir()
    shutil.copytree(made, folder / "corpora" / "demo")
    make_iemocap(folder, PUBLISHED, each=67, clips=1)
    make_ravdess(folder, (1, 2, 17, 24))
    (described,) = re.findall(r"```yaml\n(.*?)```", README, flags=re.DOTALL)
    (folder / "crema-d.yaml").write_text(described, encoding="utf-8")
    for speaker, label in itertools.product((1001, 1063, 1064, 1073), ("ANG", "HAP")):
        write_clip(folder / "AudioWAV" / f"{speaker}_DFA_{label}_XX.wav", pitch=speaker % 100 * 10 + ord(label[0]))
    (folder / "tiny.yaml").write_text(yaml.safe_dump(RECIPE), encoding="utf-8")
    return folder


@pytest.mark.required
@pytest.mark.timeout(120 * len(SHORTER))  # each of which has a limit of its own
def test_the_commands_of_the_readme_end_well_one_after_the_other(desk: Path) -> None:
    scripts = Path(sys.executable).parent
    environment = os.environ | {"PATH": f"{scripts}{os.pathsep}{os.environ['PATH']}", "DS_ACCELERATOR": "cpu"}
    for command, shorter in SHORTER.items():
        for long, short in shorter.items():
            assert long in command
            command = command.replace(long, short)
        done = subprocess.run(
            command,
            shell=True,
            cwd=desk,
            env=environment,
            capture_output=True,
            text=True,
            timeout=stretched(300),
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
    for made in ("corpora/mine.html", "runs/mine/eval-test/report.html"):
        assert (desk / made).stat().st_size > 10_000, made
    assert (desk / "runs/local/best/model.safetensors").exists()
    assert (desk / "runs/demo/status").read_text() == "finished\n"
