"""Base models on disk: every layout is read alike, and every defect of a file is said in words."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from checkpoint_doubles import MakeCheckpoint
from safetensors.torch import load_file

from sparse_ds.config.errors import UserError
from sparse_ds.model.base_checkpoint import BaseCheckpoint

NAME = "model.layers.0.mlp.up_proj.weight"


def test_one_file_several_files_and_bin_files_hold_the_same(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint()
    expected = load_file(folder / "model.safetensors")
    single = BaseCheckpoint(folder)
    assert single.is_safetensors and set(single.names) == set(expected)
    assert all(torch.equal(single.read(name), tensor) for name, tensor in expected.items())
    in_bin = BaseCheckpoint(make_checkpoint(bin=True))
    assert not in_bin.is_safetensors
    assert all(torch.equal(in_bin.read(name), tensor) for name, tensor in expected.items())
    (folder / "pytorch_model.bin").unlink()
    sharded = BaseCheckpoint(make_checkpoint(max_shard_size="1KB"))
    assert len(list(folder.glob("model-*.safetensors"))) > 3
    assert all(torch.equal(sharded.read(name), tensor) for name, tensor in expected.items())
    files = [sharded._file_of[name] for name in sharded.names]
    assert files == sorted(files), "reading in this order opens files again and again"


def test_safetensors_win_over_bin(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint()
    (folder / "pytorch_model.bin").write_bytes(b"never opened")
    assert BaseCheckpoint(folder).is_safetensors


def test_contains_and_fingerprint(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint()
    checkpoint = BaseCheckpoint(folder)
    assert NAME in checkpoint and "model.layers.2.mlp.up_proj.weight" not in checkpoint
    before = checkpoint.fingerprint()
    assert BaseCheckpoint(folder).fingerprint() == before
    assert BaseCheckpoint(make_checkpoint(intermediate_size=20)).fingerprint() != before


@pytest.mark.parametrize("bin", [False, True])
def test_a_truncated_file(make_checkpoint: MakeCheckpoint, bin: bool) -> None:
    folder = make_checkpoint(bin=bin)
    path = folder / ("pytorch_model.bin" if bin else "model.safetensors")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(UserError, match=rf"model.name_or_path: .*{path.name} cannot be read .* truncated or damaged"):
        BaseCheckpoint(folder)


def test_a_truncated_shard(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint(max_shard_size="1KB")
    checkpoint = BaseCheckpoint(folder)
    path = folder / checkpoint._file_of[NAME]
    path.write_bytes(path.read_bytes()[:-10])
    # Already open: found where the bytes are missing.
    with pytest.raises(UserError, match=rf"{path.name} cannot be read \(it ends inside .*Get the file again"):
        [checkpoint.read(name) for name in checkpoint.names]
    with pytest.raises(UserError, match=rf"{path.name} cannot be read .*Get the file again"):
        BaseCheckpoint(folder)


@pytest.mark.parametrize("damage", [b"\xff" * 8, b"\x08\0\0\0\0\0\0\0nonsense"], ids=["length", "header"])
def test_a_damaged_header(make_checkpoint: MakeCheckpoint, damage: bytes) -> None:
    path = make_checkpoint() / "model.safetensors"
    path.write_bytes(damage + path.read_bytes()[len(damage) :])
    with pytest.raises(UserError, match=r"model.safetensors cannot be read .*truncated or damaged"):
        BaseCheckpoint(path.parent)


@pytest.mark.parametrize("bin", [False, True])
def test_ranges_are_counted(make_checkpoint: MakeCheckpoint, bin: bool) -> None:
    checkpoint = BaseCheckpoint(make_checkpoint(bin=bin))
    whole = checkpoint.read(NAME)
    stored = checkpoint.stored(NAME)
    assert (stored.shape, stored.dtype, stored.num_bytes) == (tuple(whole.shape), whole.dtype, 2 * whole.numel())
    assert checkpoint.bytes_read == stored.num_bytes
    for start, stop in [(0, 0), (0, 1), (5, 17), (whole.numel() - 1, whole.numel())]:
        before = checkpoint.bytes_read
        assert torch.equal(checkpoint.read_range(NAME, start, stop), whole.view(-1)[start:stop])
        assert checkpoint.bytes_read - before == 2 * (stop - start)
    assert checkpoint.size_bytes == sum(checkpoint.read(name).nbytes for name in checkpoint.names)


def test_an_index_that_leads_out_of_the_folder(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder = make_checkpoint()
    (tmp_path / "elsewhere.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    index = {"weight_map": {NAME: "../elsewhere.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match=r"index.json names 1 missing file\(s\): ../elsewhere.safetensors"):
        BaseCheckpoint(folder)


def test_an_index_that_names_a_missing_file(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint(max_shard_size="1KB")
    missing = sorted(folder.glob("model-*.safetensors"))[1]
    missing.unlink()
    with pytest.raises(UserError, match=rf"index.json names 1 missing file\(s\): {missing.name}. Get the checkpoint"):
        BaseCheckpoint(folder)


@pytest.mark.parametrize("bin", [False, True])
def test_an_index_that_names_a_tensor_that_is_not_in_the_file(make_checkpoint: MakeCheckpoint, bin: bool) -> None:
    folder = make_checkpoint(bin=bin)
    file_name = "pytorch_model.bin" if bin else "model.safetensors"
    (folder / f"{file_name}.index.json").write_text(json.dumps({"weight_map": {"absent.weight": file_name}}))
    with pytest.raises(UserError, match=rf"{file_name} has no tensor 'absent.weight', which .* says \(1 in all\)"):
        BaseCheckpoint(folder)


@pytest.mark.parametrize("content", ["{}", '{"weight_map": []}', '{"weight_map": {}}'])
def test_an_index_without_a_map(make_checkpoint: MakeCheckpoint, content: str) -> None:
    folder = make_checkpoint()
    (folder / "model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match=r"index.json has no `weight_map`; get the file again"):
        BaseCheckpoint(folder)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "has no config.json; expected the folder of a transformers checkpoint"),
        (b"{", "config.json is not valid JSON"),
        (b"\xff\xfe", "config.json is not valid JSON"),
        (b"[]", "config.json holds no JSON object"),
    ],
)
def test_a_config_that_cannot_be_read(make_checkpoint: MakeCheckpoint, content: bytes | None, message: str) -> None:
    folder = make_checkpoint()
    (folder / "config.json").unlink()
    if content is not None:
        (folder / "config.json").write_bytes(content)
    with pytest.raises(UserError, match=f"model.name_or_path: .*{message}"):
        BaseCheckpoint(folder)


def test_a_folder_without_weights(make_checkpoint: MakeCheckpoint) -> None:
    folder = make_checkpoint()
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"holds no weights; expected model.safetensors or pytorch_model.bin"):
        BaseCheckpoint(folder)


def test_a_bin_file_that_would_run_code_is_not_loaded(make_checkpoint: MakeCheckpoint, tmp_path: Path) -> None:
    folder = make_checkpoint(bin=True)

    class Harmful:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.touch, (tmp_path / "ran",)

    torch.save({"weight": Harmful()}, folder / "pytorch_model.bin")
    with pytest.raises(UserError, match="cannot be read"):
        BaseCheckpoint(folder)
    assert not (tmp_path / "ran").exists()
