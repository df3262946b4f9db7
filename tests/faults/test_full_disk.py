"""No room for a checkpoint: the run stops with one message, the checkpoint before stays whole, and the run goes on from
it when there is room again."""

from __future__ import annotations

import resource
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from fault_run import NUM_STEPS, RESUME, assert_same_run, carry_out, start_run, wait_until
from finished_runs import FinishedRun
from forks import Ended, wait_for

from sparse_ds.config.errors import USER_ERROR_EXIT_CODE

NUM_CHECKPOINTS_THAT_FIT = 2.5
ROOMY_KIB = 64 * 1024


@pytest.fixture
def small_disk(work: Path, undisturbed: FinishedRun) -> Iterator[Path]:
    """The output folder of the run, on a file system of its own with room for some checkpoints but not for all."""
    files = [path for path in (undisturbed.folder / "checkpoint-2").rglob("*") if path.is_file()]
    folder = work / "run"
    folder.mkdir()
    mounted = mount(folder, round(NUM_CHECKPOINTS_THAT_FIT * sum(path.stat().st_size for path in files) / 1024))
    if mounted.returncode != 0:
        pytest.skip(f"mounting a tmpfs is not allowed here ({mounted.stderr.strip()}); a limit of file sizes is tested")
    yield folder
    subprocess.run(["umount", folder], check=True)


def mount(folder: Path, size_kib: int, *options: str) -> subprocess.CompletedProcess[str]:
    command = ["mount", "-t", "tmpfs", "-o", ",".join([f"size={size_kib}k", *options]), "tmpfs", str(folder)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def check_end(ended: list[Ended], run: Path, whole: set[str]) -> None:
    """All ranks have ended with one message, and nothing half-written is there."""
    assert [rank.exit_code for rank in ended] == [USER_ERROR_EXIT_CODE] * 2, ended
    assert ended[0].stderr.count("error: ") == 1 and "checkpoint" in ended[0].stderr, ended[0]
    assert not any("Traceback" in rank.stderr for rank in ended), ended
    assert {path.name for path in run.iterdir() if "checkpoint" in path.name} == whole


def test_a_full_file_system(work: Path, small_disk: Path, undisturbed: FinishedRun) -> None:
    ended = wait_for(start_run(work))
    num_left = len(list(small_disk.glob("checkpoint-*")))
    assert 1 <= num_left <= NUM_CHECKPOINTS_THAT_FIT
    check_end(ended, small_disk, {f"checkpoint-{2 * number}" for number in range(1, num_left + 1)})
    assert mount(small_disk, ROOMY_KIB, "remount").returncode == 0
    resumed, ended = carry_out(work, *RESUME)
    assert f"going on from run/checkpoint-{2 * num_left}" in ended[0].stdout
    assert_same_run(resumed, undisturbed)


def test_a_limit_of_file_sizes(work: Path, undisturbed: FinishedRun) -> None:
    """As a quota does it; no right to mount is needed. Imposed on the running ranks after the first checkpoint."""
    ranks = start_run(work)
    wait_until((work / "run" / "checkpoint-2" / "checkpoint.json").exists, ranks)
    for rank in ranks:
        resource.prlimit(rank.pid, resource.RLIMIT_FSIZE, (2**14, 2**14))
    ended = wait_for(ranks)
    whole = {path.name for path in (work / "run").glob("checkpoint-*")}
    assert len(whole) < NUM_STEPS // 2
    check_end(ended, work / "run", whole)
    resumed, _ = carry_out(work, *RESUME)
    assert_same_run(resumed, undisturbed)
