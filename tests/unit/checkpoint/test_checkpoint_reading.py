"""A checkpoint is used only if every byte of it is as it was written, and holds what its index says."""

from __future__ import annotations

import json
import math
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from made_checkpoints import IDENTITY, RUN_STATE, TENSORS, change_index, make_checkpoint
from safetensors.torch import load_file, save_file

from sparse_ds.checkpoint.reading import Checkpoint
from sparse_ds.config.errors import UserError

FILES = [
    "checkpoint.json",
    "trainer_state.json",
    "state-00001-of-00002.safetensors",
    "state-00002-of-00002.safetensors",
]


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    return make_checkpoint(tmp_path / "run")


def check(folder: Path) -> Checkpoint:
    checkpoint = Checkpoint(folder)
    checkpoint.verify()
    return checkpoint


@pytest.mark.parametrize("num_files", [1, 2, 3, 5, 9])
def test_any_range_comes_back_from_any_number_of_files(tmp_path: Path, num_files: int) -> None:
    checkpoint = check(make_checkpoint(tmp_path, num_files=num_files))
    assert checkpoint.names == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(checkpoint.read(name), tensor) and checkpoint.read(name).dtype == tensor.dtype
        for start in range(tensor.numel() + 1):
            for length in range(tensor.numel() - start + 1):
                piece = checkpoint.read(name, start, length)
                assert piece.tolist() == tensor.tolist()[start : start + length]
    checkpoint.close()
    assert torch.equal(checkpoint.read("q_proj.values"), TENSORS["q_proj.values"])
    assert (checkpoint.index.step, checkpoint.index.identity, checkpoint.index.run_state) == (5, IDENTITY, RUN_STATE)


def test_a_tensor_that_is_not_there_is_a_user_error(saved: Path) -> None:
    with pytest.raises(UserError, match=f"checkpoint {saved}: tensor 'x' is missing"):
        check(saved).read("x")


def test_numbers_come_back_to_the_last_digit(tmp_path: Path) -> None:
    state = {"loss": 0.1 + 0.2, "tiny": 5e-324, "none": None, "not_a_number": math.nan}
    back = check(make_checkpoint(tmp_path, run_state=state)).index.run_state
    assert (back["loss"], back["tiny"], back["none"]) == (0.1 + 0.2, 5e-324, None)
    assert math.isnan(back["not_a_number"])


def test_ranks_check_a_share_of_the_files_each(saved: Path) -> None:
    """Three files over two ranks: the first and the last are the first rank's."""
    for name, finders in (
        ("state-00001-of-00002.safetensors", {0}),
        ("state-00002-of-00002.safetensors", {1}),
        ("trainer_state.json", {0}),
    ):
        content = (saved / name).read_bytes()
        (saved / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        found = set()
        for share in (0, 1):
            try:
                Checkpoint(saved).verify(share, 2)
            except UserError:
                found.add(share)
        assert found == finders, name
        (saved / name).write_bytes(content)
    check(saved)


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_seen(saved: Path, name: str) -> None:
    path = saved / name
    original = path.read_bytes()
    positions = range(0, len(original), max(1, len(original) // 60))
    for position in [*positions, len(original) - 1]:
        content = bytearray(original)
        content[position] ^= 1
        path.write_bytes(content)
        with pytest.raises(UserError, match=f"checkpoint {saved}: .*(damaged|format)"):
            check(saved)
    path.write_bytes(original)
    check(saved)


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("kept_fraction", [0.0, 0.5, 0.99])
def test_a_truncated_file_is_seen(saved: Path, name: str, kept_fraction: float) -> None:
    content = (saved / name).read_bytes()
    (saved / name).write_bytes(content[: int(len(content) * kept_fraction)])
    with pytest.raises(UserError, match=f"{name} is damaged"):
        check(saved)


@pytest.mark.parametrize("name", FILES[1:])
def test_a_missing_file_is_named(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(UserError, match=f"checkpoint {saved}: {name} is missing"):
        check(saved)


def test_a_folder_without_an_index_is_no_checkpoint(saved: Path, tmp_path: Path) -> None:
    (saved / "checkpoint.json").unlink()
    for folder in (saved, tmp_path / "none", saved / "trainer_state.json"):
        with pytest.raises(UserError, match=f"checkpoint {folder}: has no readable checkpoint.json"):
            check(folder)


@pytest.mark.parametrize(
    "content",
    ["[]", "{}", "null", '{"format": "sparse_ds.checkpoint"}', '{"format_version": "2"}', "[" * 100_000, "\xff"],
    ids=range(7),
)
def test_another_json_file_is_no_index(saved: Path, content: str) -> None:
    (saved / "checkpoint.json").write_text(content, encoding="latin-1")
    with pytest.raises(UserError, match=r"checkpoint\.json is damaged or of another format"):
        check(saved)


@pytest.mark.parametrize("version", [1, 3])
def test_another_version_is_refused(saved: Path, version: int) -> None:
    change_index(saved, format_version=version, invention={})
    with pytest.raises(UserError, match=rf"format sparse_ds\.checkpoint version {version}, expected .* version 2\."):
        check(saved)


def test_another_format_is_refused(saved: Path) -> None:
    change_index(saved, format="other.checkpoint")
    with pytest.raises(UserError, match=r"format other\.checkpoint version 2, expected sparse_ds\.checkpoint"):
        check(saved)


ENTRY = {"dtype": "F32", "num_elements": 7, "slice_elements": 4}


@pytest.mark.parametrize(
    "changed",
    [
        {"invention": 1},
        {"step": -1},
        {"step": "5"},
        {"num_state_files": 0},
        {"num_state_files": 3},
        {"num_state_files": 10**9},
        {"tensors": {"q_proj.values": {**ENTRY, "slice_elements": 0}}},
        {"tensors": {"q_proj.values": {**ENTRY, "num_elements": -7}}},
        {"tensors": {"q_proj.values": {**ENTRY, "num_elements": 2**60}}},
        {"tensors": {"q_proj.values": {**ENTRY, "num_elements": 7.0}}},
        {"tensors": {"q_proj.values": {**ENTRY, "dtype": "object"}}},
        {"tensors": {"q_proj.values": {**ENTRY, "file": "/etc/passwd"}}},
    ],
    ids=str,
)
def test_an_index_that_cannot_be_is_refused(saved: Path, changed: dict[str, Any]) -> None:
    change_index(saved, **changed)
    with pytest.raises(UserError, match="damaged or of another format"):
        check(saved)


@pytest.mark.parametrize(
    ("name", "entry"),
    [
        ("q_proj.values", {**ENTRY, "num_elements": 8}),
        ("q_proj.values", {**ENTRY, "num_elements": 2**40, "slice_elements": 2**39}),
        ("q_proj.values", {**ENTRY, "slice_elements": 5}),
        ("q_proj.values", {**ENTRY, "dtype": "I32"}),
        ("q_proj.values", None),
        ("x", ENTRY),
    ],
    ids=str,
)
def test_files_that_hold_something_else_are_refused(saved: Path, name: str, entry: dict[str, Any] | None) -> None:
    tensors = json.loads((saved / "checkpoint.json").read_text())["tensors"]
    tensors[name] = entry
    change_index(saved, tensors={key: value for key, value in tensors.items() if value is not None})
    with pytest.raises(UserError, match=f"state-0000[12]-of-00002.safetensors holds .* of tensor '{name}', expected"):
        check(saved)


def test_a_tensor_of_two_dimensions_is_refused(saved: Path) -> None:
    path = saved / FILES[2]
    tensors = load_file(path)
    save_file({**tensors, "q_proj.values": tensors["q_proj.values"].view(2, 2)}, path)
    change_index(saved)
    with pytest.raises(UserError, match=r"holds \('F32', \[2, 2\]\) of tensor 'q_proj\.values'"):
        check(saved)


def test_a_file_that_is_no_safetensors_file_is_refused(saved: Path) -> None:
    for content in (b"", b"\x80\x04pickle", b"\xff" * 64):
        (saved / FILES[2]).write_bytes(content)
        change_index(saved)
        with pytest.raises(UserError, match=r"state-00001-of-00002\.safetensors cannot be read"):
            check(saved)


@pytest.mark.parametrize(
    "escape", ["../outside.safetensors", "/etc/hostname", "sub/../../outside.safetensors", "..", ""]
)
def test_a_name_outside_the_folder_is_refused(saved: Path, escape: str) -> None:
    """It is not even read: a file with the right hash lies there."""
    shutil.copy(saved / FILES[2], saved.parent / "outside.safetensors")
    files = json.loads((saved / "checkpoint.json").read_text())["files"]
    files[escape] = files.pop(FILES[2])
    change_index(saved, files=files)
    with pytest.raises(UserError, match="damaged or of another format"):
        check(saved)


@pytest.mark.parametrize("name", FILES[1:])
def test_a_link_is_not_followed(saved: Path, name: str) -> None:
    outside = saved.parent / "outside"
    os.rename(saved / name, outside)
    (saved / name).symlink_to(outside)
    with pytest.raises(UserError, match=f"{name} is missing"):
        check(saved)
