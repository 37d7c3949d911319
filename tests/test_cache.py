"""Shards that lie elsewhere: fetched once, checked, within bounds, whatever goes wrong."""

import json
import multiprocessing
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from distributed import run_ranks
from shard_reading import ask, whole
from training_fixtures import Trained, corpus, recipe, train

from jointfuse import patience
from jointfuse.data import cache as caching
from jointfuse.data.cache import ShardCache, cache_of
from jointfuse.data.parallel import processes
from jointfuse.data.shards import Corpus
from jointfuse.errors import PassingFault, UserError

__all__ = ["corpus", "recipe"]

pytestmark = pytest.mark.required
GIB = 2**30


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(patience, "FIRST_WAIT", 0.01)
    monkeypatch.setattr(caching, "STALLED", 0.3)


@pytest.fixture
def elsewhere(corpus: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A folder with everything of the corpus but its tars, and a folder with these."""
    far, near = tmp_path / "far", tmp_path / "near"
    shutil.copytree(corpus, far)
    shutil.copytree(corpus, near, ignore=shutil.ignore_patterns("*.tar"))
    return near, far


def shards_of(near: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = Corpus.open(near, check_sizes=False).split("train").info["shards"]
    assert len(found) == 3
    return found


def kept(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix != ".lock"}


@pytest.mark.parametrize("scheme", ["{far}", "file:{far}", "pipe:cat {far}"])
def test_what_is_read_through_a_cache_is_what_the_corpus_holds(
    scheme: str, corpus: Path, elsewhere: tuple[Path, Path], tmp_path: Path
) -> None:
    near, far = elsewhere
    remote = scheme.replace("{far}", str(far)) + "/{split}/{shard}"
    cached = Corpus.open(near, cache=ShardCache(remote, tmp_path / "cache", GIB)).split("train")
    local = Corpus.open(corpus).split("train")
    for id in np.random.default_rng(0).permutation(len(local)).tolist():
        one, other = cached.sample(id), local.sample(id)
        assert (one.key, one.text) == (other.key, other.text)
        assert one.waveform is not None
        assert np.array_equal(one.waveform, other.waveform)
    assert kept(tmp_path / "cache") == {f"{shard['sha256']}.tar" for shard in shards_of(near)}


def test_eight_processes_that_ask_at_once_fetch_each_shard_once(elsewhere: tuple[Path, Path], tmp_path: Path) -> None:
    near, far = elsewhere
    remote = f"pipe:echo {{shard}} >> {tmp_path}/fetched; sleep 0.1; cat {far}/{{split}}/{{shard}}"
    cache, shards = ShardCache(remote, tmp_path / "cache", GIB), shards_of(near)
    with processes(8, ask.__module__) as pool:
        assert all(pool.map(ask, repeat(cache), repeat(shards), range(8)))
    assert sorted((tmp_path / "fetched").read_text().split()) == sorted(shard["name"] for shard in shards)


def test_the_shard_used_longest_ago_makes_room(elsewhere: tuple[Path, Path], tmp_path: Path) -> None:
    near, far = elsewhere
    shards = shards_of(near)
    bound = sum(sorted(shard["bytes"] for shard in shards)[-2:])
    cache = ShardCache(f"{far}/{{split}}/{{shard}}", tmp_path / "cache", bound)
    for number in (0, 1, 0, 2, 1, 1, 0):
        assert whole(cache, shards[number])
        held = [path.stat().st_size for path in (tmp_path / "cache").glob("*.tar")]
        assert sum(held) <= bound
        if number == 2:
            assert kept(tmp_path / "cache") == {f"{shards[n]['sha256']}.tar" for n in (0, 2)}, "1 was used before 0"


def test_many_processes_stay_within_bounds_together(elsewhere: tuple[Path, Path], tmp_path: Path) -> None:
    near, far = elsewhere
    shards = shards_of(near)
    bound = 2 * max(shard["bytes"] for shard in shards)
    cache = ShardCache(f"pipe:sleep 0.02; cat {far}/{{split}}/{{shard}}", tmp_path / "cache", bound)
    most, done = [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            sizes = [path.stat().st_size for path in (tmp_path / "cache").glob("*.tar") if path.exists()]
            most[0] = max(most[0], sum(sizes))

    watching = threading.Thread(target=watch)
    with processes(2, ask.__module__) as pool:
        watching.start()
        assert all(pool.map(ask, repeat(cache), repeat(shards), range(12)))
    done.set()
    watching.join()
    assert 0 < most[0] <= bound


def test_a_command_that_fails_twice_is_asked_a_third_time(elsewhere: tuple[Path, Path], tmp_path: Path) -> None:
    near, far = elsewhere
    count = tmp_path / "count"
    remote = (
        f"pipe:echo x >> {count}; head -c 1000 {far}/{{split}}/{{shard}}; [ $(wc -l < {count}) -gt 2 ] || exit 1; "
        f"tail -c +1001 {far}/{{split}}/{{shard}}"
    )
    cache = ShardCache(remote, tmp_path / "cache", GIB)
    assert whole(cache, shards_of(near)[1])
    assert count.read_text().count("x") == 3


@pytest.mark.parametrize(
    ("remote", "reason", "passes"),
    [
        ("pipe:exit 3 # {shard}", "exit 3", True),
        ("pipe:head -c 1000 {far}/{split}/{shard}", "it ended after 1000 of", True),
        ("pipe:head -c 1000 {far}/{split}/{shard}; sleep 60", "nothing came for 0.3 s", True),
        ("pipe:cat {far}/{split}/{shard} /bin/sh", "it has more than the", False),
        ("pipe:tr a b < {far}/{split}/{shard}", "its SHA-256 is not the one in corpus.json", False),
        ("{far}/nowhere/{shard}", "No such file or directory", False),
    ],
)
def test_what_cannot_be_fetched_is_named_with_its_reason_and_passes_unless_another_file_came(
    remote: str, reason: str, passes: bool, elsewhere: tuple[Path, Path], tmp_path: Path
) -> None:
    near, far = elsewhere
    cache = ShardCache(remote.replace("{far}", str(far)), tmp_path / "cache", GIB, patience=0.1)
    shard = shards_of(near)[0]
    with pytest.raises(PassingFault if passes else UserError) as caught:
        cache.open("train", shard)
    assert reason in str(caught.value)
    assert f"shard train/{shard['name']}{': not to be had for' if passes else ' was not to be had'}" in str(
        caught.value
    )
    assert kept(tmp_path / "cache") == set(), "nothing half is left"


def test_a_cached_shard_that_is_written_to_is_fetched_again(elsewhere: tuple[Path, Path], tmp_path: Path) -> None:
    near, far = elsewhere
    cache, shard = ShardCache(f"{far}/{{split}}/{{shard}}", tmp_path / "cache", GIB), shards_of(near)[0]
    assert whole(cache, shard)
    (path,) = (tmp_path / "cache").glob("*.tar")
    for damage in (lambda data: data[:5000] + b"oops" + data[5004:], lambda data: data[:-512], lambda data: data):
        path.write_bytes(damage(path.read_bytes()))
        assert whole(cache, shard)
    (far / "train" / shard["name"]).unlink()
    assert whole(cache, shard), "it was not asked for again"
    path.write_bytes(path.read_bytes())
    assert whole(cache, shard), "what was touched and is still the same is kept"


def test_bits_that_rot_unseen_are_noticed_when_they_are_decoded(elsewhere: tuple[Path, Path], tmp_path: Path) -> None:
    near, far = elsewhere
    split = Corpus.open(near, cache=ShardCache(f"{far}/{{split}}/{{shard}}", tmp_path / "cache", GIB)).split("train")
    before = split.sample(1)
    (path,) = (tmp_path / "cache").glob("*.tar")
    status, entry = path.stat(), split.index[1]
    data = bytearray(path.read_bytes())
    begin = data.index(b"fLaC", int(entry["offset"]))
    data[begin : begin + 64] = bytes(64)
    path.write_bytes(data)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    after = split.sample(1)
    assert before.waveform is not None
    assert np.array_equal(before.waveform, after.waveform)


def test_parts_of_the_dead_make_room(elsewhere: tuple[Path, Path], tmp_path: Path) -> None:
    near, far = elsewhere
    shards = shards_of(near)
    bound = max(shard["bytes"] for shard in shards)
    slow = ShardCache(f"pipe:cat {far}/{{split}}/{{shard}}; sleep 60", tmp_path / "cache", bound)
    fetching = multiprocessing.get_context("spawn").Process(target=slow.open, args=("train", shards[0]))
    fetching.start()
    while not list((tmp_path / "cache").glob("*.part")):
        time.sleep(0.01)
    fetching.kill()
    fetching.join()
    assert [path.suffix for path in (tmp_path / "cache").iterdir() if path.suffix != ".lock"] == [".part"]
    cache = ShardCache(f"{far}/{{split}}/{{shard}}", tmp_path / "cache", bound)
    assert whole(cache, shards[1])
    assert kept(tmp_path / "cache") == {f"{shards[1]['sha256']}.tar"}


@pytest.fixture
def small_disk(elsewhere: tuple[Path, Path], tmp_path: Path) -> Iterator[Path]:
    """A file system with room for one shard and a half."""
    folder = tmp_path / "disk"
    folder.mkdir()
    size = max(shard["bytes"] for shard in shards_of(elsewhere[0])) * 3 // 2
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("no file system can be mounted here (root can)")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_made_room_on_before_it_is_an_error(
    elsewhere: tuple[Path, Path], small_disk: Path, tmp_path: Path
) -> None:
    near, far = elsewhere
    cache = ShardCache(f"{far}/{{split}}/{{shard}}", small_disk, GIB)
    shards = shards_of(near)
    for number in (0, 1, 0):
        assert whole(cache, shards[number])
        assert kept(small_disk) == {f"{shards[number]['sha256']}.tar"}
    cache.drop(shards[0])
    others = small_disk / "others"
    others.write_bytes(bytes(shards[0]["bytes"]))
    with pytest.raises(UserError, match=f"No space left on device.*data.cache = {small_disk} has room"):
        cache.open("train", shards[1])
    assert kept(small_disk) == {"others"}


def test_a_shards_name_is_no_command(elsewhere: tuple[Path, Path], tmp_path: Path) -> None:
    near, far = elsewhere
    info = json.loads((near / "corpus.json").read_text())
    shard = info["splits"]["train"]["shards"][0]
    shard["name"] = f"x.tar; touch $HOME {tmp_path.name}-pwned; '.tar"
    cache = ShardCache(f"pipe:cd {tmp_path}; cat {far}/{{split}}/{{shard}}", tmp_path / "cache", GIB, patience=0)
    with pytest.raises(PassingFault, match="not to be had"):
        cache.open("train", shard)
    assert not list(tmp_path.rglob("*pwned*"))


def test_a_shards_hash_leads_nowhere_else(elsewhere: tuple[Path, Path], tmp_path: Path) -> None:
    near, far = elsewhere
    cache = ShardCache(f"{far}/{{split}}/{{shard}}", tmp_path / "cache", GIB)
    with pytest.raises(UserError, match="is no SHA-256; do not trust this corpus"):
        cache.open("train", shards_of(near)[0] | {"sha256": "../elsewhere"})


def test_settings_that_make_no_cache_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.remote is set and data\.cache is not"):
        cache_of("https://host/{shard}", "", 1)
    with pytest.raises(UserError, match=r"data\.cache is set and data\.remote is not"):
        cache_of("", str(tmp_path), 1)
    with pytest.raises(UserError, match=r"write \{shard\} where the name of a shard goes"):
        cache_of("https://host/", str(tmp_path), 1)
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="no folder can be made there"):
        cache_of("https://host/{shard}", str(tmp_path / "file" / "cache"), 1)
    assert cache_of("", "", 1) is None


def test_a_shard_larger_than_the_cache_says_which_setting(elsewhere: tuple[Path, Path], tmp_path: Path) -> None:
    near, far = elsewhere
    cache = ShardCache(f"{far}/{{split}}/{{shard}}", tmp_path / "cache", 1000)
    with pytest.raises(UserError, match=r"data\.cache_gib = .*: one shard alone has .* GiB; allow more"):
        cache.open("train", shards_of(near)[0])


def near_and_far(recipe: Path, near: Path, far: Path, folder: Path) -> tuple[Trained, Trained]:
    remote = f"data.remote=pipe:cat {far}/{{split}}/{{shard}}"
    settings = ("train.steps=9", "data.workers=1")
    local = train(recipe, folder / "local", *settings)
    cached = (f"data.corpus={near}", remote, f"data.cache={folder / 'cache'}", "data.cache_gib=0.01")
    return local, train(recipe, folder / "cached", *settings, *cached)


def test_training_from_elsewhere_is_training_from_here(
    recipe: Path, elsewhere: tuple[Path, Path], tmp_path: Path
) -> None:
    local, cached = run_ranks(2, near_and_far, tmp_path / "ranks", recipe, *elsewhere, tmp_path)[0]
    assert local.losses.shape == (9, 3)
    assert np.array_equal(local.losses, cached.losses)
