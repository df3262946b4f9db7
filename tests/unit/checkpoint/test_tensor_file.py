"""What is written as a stream is what the safetensors library reads, and its hash is that of the file."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sparse_ds.checkpoint import tensor_file
from sparse_ds.checkpoint.tensor_file import TensorFile, TensorSpec, write_tensors

DTYPES = [torch.float32, torch.int32, torch.int64, torch.uint8]


@settings(max_examples=50, deadline=None)
@given(
    shapes=st.lists(st.tuples(st.sampled_from(DTYPES), st.integers(0, 9)), max_size=8), write_bytes=st.integers(1, 99)
)
def test_the_library_reads_it(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[tuple[torch.dtype, int]], write_bytes: int
) -> None:
    flat = torch.arange(-40, 40)
    # Views of one storage, as the slices of an engine's flat tensors are.
    tensors = {f'läyer "{i}"': flat.to(dtype)[i : i + size] for i, (dtype, size) in enumerate(shapes)}
    path = tmp_path_factory.mktemp("file") / "a.safetensors"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tensor_file, "_WRITE_BYTES", write_bytes)
        digest = write_tensors(path, tensors)
    assert hashlib.sha256(path.read_bytes()).hexdigest() == digest
    back = load_file(path)
    assert back.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert back[name].dtype == tensor.dtype and torch.equal(back[name], tensor)
    with safe_open(path, framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_file_is_that_of_the_library(tmp_path: Path) -> None:
    """Byte for byte, whatever the order in which the tensors come."""
    shapes = {"b": (3,), "a.10": (2, 5), "a.9": (), "c": (0, 4)}
    tensors = {
        f"{name}.{dtype}": (torch.randn(shape) * 50).abs().to(dtype)
        for name, shape in shapes.items()
        for dtype in [*DTYPES, torch.bfloat16, torch.float16]
    }
    save_file(tensors, tmp_path / "theirs", metadata={"format": "pt"})
    write_tensors(tmp_path / "ours", tensors)
    specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    with TensorFile(tmp_path / "in_pieces", specs) as file:
        for name in reversed(tensors):
            file.write(name, tensors[name])
    for name in ("ours", "in_pieces"):
        assert (tmp_path / name).read_bytes() == (tmp_path / "theirs").read_bytes()


def test_an_existing_file_is_not_touched(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")
    with pytest.raises(FileExistsError):
        write_tensors(tmp_path / "a", {"x": torch.zeros(1)})
    assert (tmp_path / "a").read_text() == "old"
