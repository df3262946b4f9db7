"""Two runs never mix in one folder, and nothing of anybody else's is touched."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from sparse_ds.config.errors import UserError
from sparse_ds.training.output_folder import OutputFolder, versions


@pytest.fixture
def folder(tmp_path: Path) -> OutputFolder:
    return OutputFolder(str(tmp_path / "runs" / "one"))


def fill_with_a_run(folder: OutputFolder) -> None:
    folder.create({"train": {"seed": 1}}, resume=None)
    folder.metrics.write_text("{}\n")
    for entry in (folder.adapter, folder.merged, folder.path / "checkpoint-20"):
        entry.mkdir()
        (entry / "weights").write_text("x")


def test_a_new_and_an_empty_folder_are_taken(folder: OutputFolder) -> None:
    folder.check(overwrite=False, resume=None)
    folder.path.mkdir(parents=True)
    folder.check(overwrite=False, resume=None)
    folder.create({"model": {"dtype": "float32"}}, resume=None)
    written = json.loads(folder.resolved_config.read_text())
    assert written == {"model": {"dtype": "float32"}, "versions": versions()}
    assert written["versions"]["torch"].startswith("2.")
    assert [entry.name for entry in folder.path.iterdir()] == ["resolved_config.json"], "a temporary file is left"


@pytest.mark.parametrize("trace", ["resolved_config.json", "metrics.jsonl"])
def test_a_folder_with_a_run_is_refused(folder: OutputFolder, trace: str) -> None:
    folder.path.mkdir(parents=True)
    (folder.path / trace).write_text("{}")
    with pytest.raises(UserError, match=r"train.output_dir: .* already holds a run\. .*train\.overwrite=true"):
        folder.check(overwrite=False, resume=None)
    folder.check(overwrite=True, resume=None)
    folder.check(overwrite=False, resume="auto")


def test_overwriting_removes_the_old_run_and_nothing_else(folder: OutputFolder) -> None:
    fill_with_a_run(folder)
    (folder.path / "notes.txt").write_text("mine")
    folder.check(overwrite=True, resume=None)
    folder.create({}, resume=None)
    assert sorted(entry.name for entry in folder.path.iterdir()) == ["notes.txt", "resolved_config.json"]


def test_going_on_keeps_everything(folder: OutputFolder) -> None:
    fill_with_a_run(folder)
    folder.create({}, resume=str(folder.path / "checkpoint-20"))
    assert (folder.path / "checkpoint-20" / "weights").exists() and folder.metrics.exists()


def test_resuming_from_another_runs_checkpoint_is_a_new_run_here(folder: OutputFolder, tmp_path: Path) -> None:
    assert not folder.goes_on(str(tmp_path / "runs" / "two" / "checkpoint-20"))
    fill_with_a_run(folder)
    with pytest.raises(UserError, match="already holds a run"):
        folder.check(overwrite=False, resume=str(tmp_path / "runs" / "two" / "checkpoint-20"))


def test_overwriting_what_is_to_be_resumed_is_refused(folder: OutputFolder) -> None:
    fill_with_a_run(folder)
    with pytest.raises(UserError, match=r"train.overwrite: got true .* together with checkpoint.resume auto"):
        folder.check(overwrite=True, resume="auto")


def test_a_file_is_refused(folder: OutputFolder) -> None:
    folder.path.parent.mkdir(parents=True)
    folder.path.write_text("x")
    with pytest.raises(UserError, match=r"train.output_dir: .*one is a file; expected a folder or a new name"):
        folder.check(overwrite=True, resume=None)


def test_somebody_elses_folder_is_refused_even_to_overwrite(folder: OutputFolder) -> None:
    folder.path.mkdir(parents=True)
    (folder.path / "thesis.tex").write_text("x")
    for overwrite in (False, True):
        with pytest.raises(UserError, match="is not empty and holds no run of sparse_ds; nothing in it is touched"):
            folder.check(overwrite=overwrite, resume=None)


def test_a_link_is_removed_not_followed(folder: OutputFolder, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "model").write_text("x")
    fill_with_a_run(folder)
    (folder.merged / "weights").unlink()
    folder.merged.rmdir()
    folder.merged.symlink_to(elsewhere)
    folder.create({}, resume=None)
    assert not folder.merged.is_symlink() and (elsewhere / "model").exists()


def test_a_folder_that_cannot_be_written_is_a_user_error(folder: OutputFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(source: object, target: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(UserError, match=r"train.output_dir: cannot write to .* \(No space left on device\)"):
        folder.create({}, resume=None)
