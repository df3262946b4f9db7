"""One safetensors file, written tensor by tensor.

    8 bytes     length of the header, little-endian
    header      JSON: name -> dtype, shape, place in the data; filled up with spaces to a multiple of 8 bytes
    data        the tensors one after the other, wide dtypes first, so that each begins at a multiple of its item size

`safetensors.torch.save_file` takes whole dictionaries of tensors in memory and refuses views of one storage, which the
slices of an engine's flat tensors are; its file would have to be read again to be hashed; and it tells a full disk by
text only. Its files are the same, byte for byte. Reading is left to the library.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

DTYPES = {torch.float32: "F32", torch.int32: "I32", torch.int64: "I64", torch.uint8: "U8"}
"""Of the tensors of a checkpoint, by safetensors' names."""
_ALL_DTYPES = {**DTYPES, torch.bfloat16: "BF16", torch.float16: "F16"}
# As the library orders them: wide ones first, then in its own order; within a dtype by name.
_ORDER = ("I64", "F32", "I32", "BF16", "F16", "U8")
_WRITE_BYTES = 2**26


@dataclass(frozen=True)
class TensorSpec:
    """What the header says of a tensor."""

    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def num_bytes(self) -> int:
        return torch.Size(self.shape).numel() * self.dtype.itemsize


class TensorFile:
    """A new file whose tensors are known by name, dtype and shape; they are written in any order, one at a time.

    Args:
        path: must not exist.
        specs: of all tensors.

    Raises:
        OSError: the file cannot be written; of every method.
    """

    def __init__(self, path: Path, specs: Mapping[str, TensorSpec]) -> None:
        header, self._places = _plan(specs)
        self._specs = dict(specs)
        self._missing = set(specs)
        self._file = path.open("xb")
        self._file.write(header)
        size = max((place + specs[name].num_bytes for name, place in self._places.items()), default=len(header))
        self._file.truncate(size)

    def write(self, name: str, tensor: Tensor) -> None:
        """Write one tensor, of the dtype and shape that were said, on any device. Memory: a copy if not on the host."""
        spec = self._specs[name]
        assert (tensor.dtype, tuple(tensor.shape)) == (spec.dtype, spec.shape), f"{name}: {tensor.dtype} {tensor.shape}"
        self._missing.remove(name)
        self._file.seek(self._places[name])
        for piece in _pieces(tensor):
            self._file.write(piece)

    def __enter__(self) -> TensorFile:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        assert kind is not None or not self._missing, f"never written: {sorted(self._missing)}"


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a new file and flush it to disk.

    Args:
        path: must not exist.
        tensors: of the dtypes above, on any device; views of one storage are allowed.

    Returns:
        sha256 of the file.

    Memory: one tensor on the host, where it is not there already.

    Raises:
        OSError: the file cannot be written.
    """
    specs = {name: TensorSpec(tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}
    header, places = _plan(specs)
    digest = hashlib.sha256(header)
    with path.open("xb") as file:
        file.write(header)
        for name in places:
            for piece in _pieces(tensors[name]):
                file.write(piece)
                digest.update(piece)
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _plan(specs: Mapping[str, TensorSpec]) -> tuple[bytes, dict[str, int]]:
    """The bytes before the data, and where in the file each tensor begins, in the order of the file."""
    order = sorted(specs, key=lambda name: (_ORDER.index(_ALL_DTYPES[specs[name].dtype]), name))
    content: dict[str, object] = {"__metadata__": {"format": "pt"}}
    places, end = {}, 0
    for name in order:
        spec = specs[name]
        begin, end = end, end + spec.num_bytes
        content[name] = {"dtype": _ALL_DTYPES[spec.dtype], "shape": list(spec.shape), "data_offsets": [begin, end]}
        places[name] = begin
    header = json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()
    header += b" " * (-len(header) % 8)
    header = len(header).to_bytes(8, "little") + header
    return header, {name: len(header) + place for name, place in places.items()}


def _pieces(tensor: Tensor) -> Iterator[memoryview]:
    content = tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data
    for begin in range(0, len(content), _WRITE_BYTES):
        yield content[begin : begin + _WRITE_BYTES]
