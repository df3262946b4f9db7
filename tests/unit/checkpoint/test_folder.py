"""A checkpoint is used only if every byte of it is as it was written."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from sparse_ds.checkpoint import folder as checkpoint_folder
from sparse_ds.checkpoint.folder import (
    INDEX_FILE,
    TRAINER_STATE_FILE,
    Checkpoint,
    CheckpointIndex,
    CheckpointWriter,
    check_identity,
    checkpoint_path,
    find_checkpoint,
    list_checkpoints,
    remove_checkpoints_after,
    remove_old_checkpoints,
    writing_checkpoint,
)
from sparse_ds.config.errors import UserError

TENSORS = {
    "q_proj.indices": torch.arange(7, dtype=torch.int32) * 3,
    "q_proj.values": torch.linspace(-1, 1, 7),
    "q_proj.row_accumulator": torch.rand(5, generator=torch.Generator().manual_seed(0)),
}
IDENTITY = {"seed": 0, "dtype": "bfloat16", "active_weights": {"q_proj": 7, "k_proj": 3}}
RUN_STATE = {"heldout_before": 2.5, "index_hash": "ab", "scheduler": {"last_epoch": 5}}


def save(run: Path, step: int = 5, **run_state: Any) -> Path:
    with writing_checkpoint(run, step) as folder:
        writer = CheckpointWriter(folder)
        for name, tensor in TENSORS.items():
            writer.add(name, tensor)
        (folder / TRAINER_STATE_FILE).write_text('{"global_step": 5}', encoding="utf-8")
        writer.finish(CheckpointIndex(step=step, identity=IDENTITY, run_state=RUN_STATE | run_state))
    return checkpoint_path(run, step)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return save(tmp_path / "run")


def change_index(folder: Path, **changed: Any) -> None:
    """Changes of somebody who knows the format: the checksum is that of the new content."""
    path = folder / INDEX_FILE
    content = {**json.loads(path.read_text()), **changed}
    content.pop("sha256")
    path.write_text(json.dumps({**content, "sha256": checkpoint_folder._checksum(content)}))


def test_everything_comes_back(saved: Path) -> None:
    checkpoint = Checkpoint(saved)
    assert checkpoint.names == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert checkpoint.num_elements(name) == tensor.numel()
        assert torch.equal(checkpoint.read(name), tensor) and checkpoint.read(name).dtype == tensor.dtype
        assert torch.equal(checkpoint.read(name, 2, 3), tensor[2:5])
    assert checkpoint.read("q_proj.values", 7, 0).numel() == 0
    assert (checkpoint.index.step, checkpoint.index.identity, checkpoint.index.run_state) == (5, IDENTITY, RUN_STATE)
    assert checkpoint.index.files.keys() == {"state-00001.safetensors", TRAINER_STATE_FILE}
    assert sorted(os.listdir(saved)) == [INDEX_FILE, "state-00001.safetensors", TRAINER_STATE_FILE]


def test_numbers_come_back_to_the_last_digit(tmp_path: Path) -> None:
    folder = save(tmp_path, loss=0.1 + 0.2, tiny=5e-324, none=None, not_a_number=math.nan)
    state = Checkpoint(folder).index.run_state
    assert (state["loss"], state["tiny"], state["none"]) == (0.1 + 0.2, 5e-324, None)
    assert math.isnan(state["not_a_number"])


def test_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checkpoint_folder, "SHARD_BYTES", 30)
    folder = save(tmp_path)
    shards = sorted(path.name for path in folder.glob("state-*"))
    assert shards == ["state-00001.safetensors", "state-00002.safetensors"]
    checkpoint = Checkpoint(folder)
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in TENSORS.items())


def test_a_write_that_fails_leaves_the_older_checkpoint(saved: Path) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    with pytest.raises(OSError, match="disk full"), writing_checkpoint(saved.parent, 5) as folder:
        CheckpointWriter(folder).add("x", torch.zeros(3))
        raise OSError("disk full")
    assert {path.name: path.read_bytes() for path in saved.iterdir()} == before
    assert os.listdir(saved.parent) == ["checkpoint-5"]


@pytest.mark.parametrize("name", [INDEX_FILE, TRAINER_STATE_FILE, "state-00001.safetensors"])
def test_a_flipped_bit_is_seen(saved: Path, name: str) -> None:
    path = saved / name
    original = path.read_bytes()
    positions = range(0, len(original), max(1, len(original) // 60))
    for position in [*positions, len(original) - 1]:
        content = bytearray(original)
        content[position] ^= 1
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"checkpoint {saved}: .*(damaged|format)"):
            Checkpoint(saved)
    path.write_bytes(original)
    Checkpoint(saved)


@pytest.mark.parametrize("name", [INDEX_FILE, TRAINER_STATE_FILE, "state-00001.safetensors"])
@pytest.mark.parametrize("kept_fraction", [0.0, 0.5, 0.99])
def test_a_truncated_file_is_seen(saved: Path, name: str, kept_fraction: float) -> None:
    content = (saved / name).read_bytes()
    (saved / name).write_bytes(content[: int(len(content) * kept_fraction)])
    with pytest.raises(UserError, match=f"{name} is damaged"):
        Checkpoint(saved)


@pytest.mark.parametrize("name", [TRAINER_STATE_FILE, "state-00001.safetensors"])
def test_a_missing_file_is_named(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(UserError, match=f"checkpoint {saved}: {name} is missing"):
        Checkpoint(saved)


def test_a_folder_without_an_index_is_no_checkpoint(saved: Path, tmp_path: Path) -> None:
    (saved / INDEX_FILE).unlink()
    for folder in (saved, tmp_path / "none", saved / TRAINER_STATE_FILE):
        with pytest.raises(UserError, match=f"checkpoint {folder}: has no readable checkpoint.json"):
            Checkpoint(folder)


@pytest.mark.parametrize(
    "content", ["[]", "{}", "null", '{"format": "sparse_ds.checkpoint"}', '{"format_version": "1"}']
)
def test_another_json_file_is_no_index(saved: Path, content: str) -> None:
    (saved / INDEX_FILE).write_text(content)
    with pytest.raises(UserError, match=r"checkpoint\.json is damaged or of another format"):
        Checkpoint(saved)


def test_a_newer_format_is_refused(saved: Path) -> None:
    change_index(saved, format_version=2, invention={"since": 2})
    with pytest.raises(
        UserError, match=r"format sparse_ds\.checkpoint version 2, expected .* up to version 1\. Use the"
    ):
        Checkpoint(saved)


def test_another_format_is_refused(saved: Path) -> None:
    change_index(saved, format="other.checkpoint")
    with pytest.raises(UserError, match=r"format other\.checkpoint version 1, expected sparse_ds\.checkpoint"):
        Checkpoint(saved)


def test_an_unknown_key_is_refused(saved: Path) -> None:
    change_index(saved, invention=1)
    with pytest.raises(UserError, match="damaged or of another format"):
        Checkpoint(saved)


@pytest.mark.parametrize(
    "escape", ["../outside.safetensors", "/etc/hostname", "sub/../../outside.safetensors", "..", ""]
)
def test_a_name_outside_the_folder_is_refused(saved: Path, escape: str) -> None:
    """It is not even read: a file with the right hash lies there."""
    outside = saved.parent / "outside.safetensors"
    shutil.copy(saved / "state-00001.safetensors", outside)
    digest = json.loads((saved / INDEX_FILE).read_text())["files"]["state-00001.safetensors"]
    change_index(saved, files={escape: digest})
    with pytest.raises(UserError, match="is missing"):
        Checkpoint(saved)


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


@pytest.mark.parametrize(("keep", "left"), [(1, [100]), (2, [10, 100]), (3, [9, 10, 100]), (9, [9, 10, 100])])
def test_the_newest_are_kept(tmp_path: Path, keep: int, left: list[int]) -> None:
    for step in (9, 100, 10):
        save(tmp_path, step)
    (tmp_path / "adapter").mkdir()
    remove_old_checkpoints(tmp_path, keep)
    assert [path.name for path in list_checkpoints(tmp_path)] == [f"checkpoint-{step}" for step in left]
    assert (tmp_path / "adapter").is_dir()


def test_those_of_later_steps_go(tmp_path: Path) -> None:
    for step in (2, 9, 10, 100):
        (tmp_path / f"checkpoint-{step}").mkdir()
    remove_checkpoints_after(tmp_path, 9)
    assert sorted(os.listdir(tmp_path)) == ["checkpoint-2", "checkpoint-9"]


def test_auto_takes_the_newest_whole_one(tmp_path: Path) -> None:
    for step in (4, 6, 8, 10):
        save(tmp_path, step)
    (tmp_path / "checkpoint-10" / TRAINER_STATE_FILE).unlink()
    (tmp_path / "checkpoint-8" / INDEX_FILE).write_text("{")
    checkpoint, problems = find_checkpoint(tmp_path, "auto")
    assert checkpoint.index.step == 6
    assert [problem.split(":")[0] for problem in problems] == [
        f"checkpoint {tmp_path}/checkpoint-10",
        f"checkpoint {tmp_path}/checkpoint-8",
    ]


def test_auto_without_a_whole_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no whole checkpoint\. Start anew with `--set train\.overwrite=true`"):
        find_checkpoint(tmp_path / "none", "auto")
    (save(tmp_path, 4) / TRAINER_STATE_FILE).unlink()
    with pytest.raises(UserError, match=r"holds no whole checkpoint \(passed over: .*trainer_state\.json is missing"):
        find_checkpoint(tmp_path, "auto")


def test_a_path_is_taken_as_it_is(tmp_path: Path) -> None:
    folder = save(tmp_path / "run", 4)
    assert find_checkpoint(tmp_path / "other", str(folder))[0].folder == folder
    assert find_checkpoint(tmp_path / "run", str(folder))[0].index.step == 4
    with pytest.raises(
        UserError, match=r"checkpoint\.resume: '.*checkpoint-5' is no folder; expected a checkpoint-<ste"
    ):
        find_checkpoint(tmp_path / "run", str(tmp_path / "run" / "checkpoint-5"))


def test_an_older_one_is_taken_for_another_folder_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for step in (4, 6):
        save(tmp_path / "run", step)
    monkeypatch.chdir(tmp_path)
    assert find_checkpoint(tmp_path / "other", "run/checkpoint-4")[0].index.step == 4
    with pytest.raises(UserError, match=r"run/checkpoint-4 is not the newest .*: checkpoint-6 would not belong to the"):
        find_checkpoint(tmp_path / "run", "run/checkpoint-4")


def test_the_same_run_may_go_on(tmp_path: Path) -> None:
    check_identity(IDENTITY, json.loads(json.dumps(IDENTITY)), tmp_path)


def test_every_difference_is_listed(tmp_path: Path) -> None:
    current = {
        "seed": 1,
        "dtype": "bfloat16",
        "momentum": 0.5,
        "active_weights": {"q_proj": 7, "k_proj": 4, "up_proj": 2},
    }
    with pytest.raises(UserError) as raised:
        check_identity(IDENTITY, current, tmp_path / "checkpoint-5")
    assert str(raised.value) == (
        f"checkpoint.resume: {tmp_path}/checkpoint-5 belongs to another run. Differences: "
        "active_weights.k_proj: checkpoint 3, this run 4 (and 1 more); momentum: checkpoint None, this run 0.5; "
        "seed: checkpoint 0, this run 1. Use the configuration that wrote it, or start anew."
    )
