"""Which checkpoint a run goes on from, and which are deleted."""

from __future__ import annotations

import logging
import os
from pathlib import Path

import pytest
from made_checkpoints import make_checkpoint

from sparse_ds.checkpoint.run_folder import (
    find_checkpoint,
    list_checkpoints,
    remove_checkpoints_after,
    remove_old_checkpoints,
)
from sparse_ds.config.errors import UserError


def test_listing_is_by_step_and_knows_nothing_else(tmp_path: Path) -> None:
    for name in (
        "checkpoint-10",
        "checkpoint-9",
        "checkpoint-100",
        "checkpoint-x",
        ".checkpoint-7.partial-ab",
        "merged",
    ):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-11").write_text("a file")
    assert [path.name for path in list_checkpoints(tmp_path)] == ["checkpoint-9", "checkpoint-10", "checkpoint-100"]
    assert list_checkpoints(tmp_path / "none") == []


@pytest.mark.parametrize(
    ("keep", "best", "left"),
    [
        (1, None, [100]),
        (2, None, [10, 100]),
        (3, None, [9, 10, 100]),
        (9, None, [9, 10, 100]),
        (1, 9, [9, 100]),
        (1, 100, [100]),
        (2, 10, [10, 100]),
        (1, 7, [100]),
    ],
)
def test_the_newest_and_the_best_are_kept(tmp_path: Path, keep: int, best: int | None, left: list[int]) -> None:
    for step in (9, 100, 10):
        make_checkpoint(tmp_path, step)
    (tmp_path / "adapter").mkdir()
    remove_old_checkpoints(tmp_path, keep, best)
    assert sorted(os.listdir(tmp_path)) == sorted(["adapter", *(f"checkpoint-{step}" for step in left)])


def test_those_of_later_steps_go(tmp_path: Path) -> None:
    for step in (2, 9, 10, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    remove_checkpoints_after(tmp_path, 9)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-2", "checkpoint-9"]


def test_auto_takes_the_newest_whole_one_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for step in (4, 6, 8, 10):
        make_checkpoint(tmp_path, step)
    (tmp_path / "checkpoint-10" / "trainer_state.json").unlink()
    (tmp_path / "checkpoint-8" / "checkpoint.json").write_text("{")
    logging.getLogger("sparse_ds").propagate = True
    checkpoint = find_checkpoint(tmp_path, "auto")
    assert checkpoint is not None and checkpoint.index.step == 6
    assert [record.getMessage().split(": ")[:2] for record in caplog.records] == [
        ["passed over", f"checkpoint {tmp_path}/checkpoint-10"],
        ["passed over", f"checkpoint {tmp_path}/checkpoint-8"],
    ]


def test_auto_without_a_whole_one(tmp_path: Path) -> None:
    assert find_checkpoint(tmp_path / "none", "auto") is None
    (make_checkpoint(tmp_path, 4) / "trainer_state.json").unlink()
    with pytest.raises(
        UserError,
        match=r"holds no whole checkpoint \(passed over: .*trainer_state\.json is missing.*Start anew with `--set",
    ):
        find_checkpoint(tmp_path, "auto")


def test_a_path_is_taken_as_it_is(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path / "run", 4)
    for run in ("other", "run"):
        checkpoint = find_checkpoint(tmp_path / run, str(folder))
        assert checkpoint is not None and (checkpoint.folder, checkpoint.index.step) == (folder, 4)
    with pytest.raises(
        UserError, match=r"checkpoint\.resume: '.*checkpoint-5' is no folder; expected a checkpoint-<ste"
    ):
        find_checkpoint(tmp_path / "run", str(tmp_path / "run" / "checkpoint-5"))
    (folder / "trainer_state.json").unlink()
    with pytest.raises(UserError, match="is missing"):
        find_checkpoint(tmp_path / "other", str(folder))


def test_an_older_one_is_taken_for_another_folder_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (4, 6):
        make_checkpoint(tmp_path / "run", step)
    monkeypatch.chdir(tmp_path)
    checkpoint = find_checkpoint(tmp_path / "other", "run/checkpoint-4")
    assert checkpoint is not None and checkpoint.index.step == 4
    with pytest.raises(UserError, match=r"run/checkpoint-4 is not the newest .*: checkpoint-6 would not belong to the"):
        find_checkpoint(tmp_path / "run", "run/checkpoint-4")
