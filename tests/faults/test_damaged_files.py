"""A flipped byte in, and the truncation of, every file of a checkpoint: seen, said, and the one before is used."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from fault_run import NUM_STEPS, RESUME, assert_same_run, carry_out
from finished_runs import FinishedRun


def flip_a_byte(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    path.write_bytes(content)


def truncate(path: Path, draw: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: draw.randrange(path.stat().st_size)])


def remove(path: Path, draw: random.Random) -> None:
    path.unlink()


@pytest.mark.parametrize("damage", [flip_a_byte, truncate, remove])
def test_every_file(damage: Callable[[Path, random.Random], None], tmp_path: Path, undisturbed: FinishedRun) -> None:
    newest, before = f"checkpoint-{NUM_STEPS}", f"checkpoint-{NUM_STEPS - 2}"
    names = sorted(
        str(path.relative_to(undisturbed.folder / newest))
        for path in (undisturbed.folder / newest).rglob("*")
        if path.is_file()
    )
    assert len(names) >= 3
    for name in names:
        work = tmp_path / "work"
        shutil.copytree(undisturbed.folder.parent, work)
        damage(work / "run" / newest / name, random.Random(f"{damage.__name__} {name}"))
        resumed, ended = carry_out(work, *RESUME)
        said = [line for line in ended[0].stdout.splitlines() if "passed over: " in line]
        assert len(said) == 1 and f"run/{newest}" in said[0] and name in said[0], (name, ended)
        assert f"going on from run/{before} (step {NUM_STEPS - 2})" in ended[0].stdout
        assert_same_run(resumed, undisturbed)
        shutil.rmtree(work)


def test_no_whole_checkpoint_is_left(tmp_path: Path, undisturbed: FinishedRun) -> None:
    """The run does not begin anew by itself: what is there may be worth a look."""
    work = tmp_path / "work"
    shutil.copytree(undisturbed.folder.parent, work)
    for folder in (work / "run").glob("checkpoint-*"):
        flip_a_byte(folder / "checkpoint.json", random.Random(folder.name))
    with pytest.raises(AssertionError, match="holds no whole checkpoint"):
        carry_out(work, *RESUME)
