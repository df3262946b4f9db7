"""One file of weights: what is in it, and any range of elements of any tensor.

Of a safetensors file only the asked bytes are read, with `preadv` into memory of our own: no mapped pages count as this
process's memory, and what was read can be counted. A `.bin` file is memory-mapped by torch (never unpickled freely).
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
"""safetensors' names (its format page, "dtype")."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as it lies in a file."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int
    """Of its first byte in the file (0 for a `.bin` file, where nobody needs it)."""

    @property
    def num_elements(self) -> int:
        return math.prod(self.shape)

    @property
    def num_bytes(self) -> int:
        return self.num_elements * self.dtype.itemsize


class UnreadableFileError(Exception):
    """The file is truncated, damaged, or cannot be opened; the text is the reason."""


class SafetensorsFile:
    """A `.safetensors` file.

    Args:
        path: of the file.

    Raises:
        UnreadableFileError: it cannot be opened, its header is damaged or does not fit to its size.
    """

    def __init__(self, path: Path) -> None:
        try:
            # The library's own checks: header, offsets without gaps, size of the file.
            with safe_open(path, framework="pt"):
                pass
            self._file = path.open("rb", buffering=0)
            header_bytes = int.from_bytes(self._file.read(8), "little")
            header = json.loads(self._file.read(header_bytes))
        except (SafetensorError, OSError, ValueError) as error:
            raise UnreadableFileError(_first_line(error)) from error
        self.tensors: dict[str, StoredTensor] = {}
        for name, entry in header.items():
            if name == "__metadata__":
                continue
            if entry["dtype"] not in DTYPES:
                raise UnreadableFileError(f"tensor {name!r} has the unknown dtype {entry['dtype']}")
            offset = 8 + header_bytes + entry["data_offsets"][0]
            self.tensors[name] = StoredTensor(name, DTYPES[entry["dtype"]], tuple(entry["shape"]), offset)

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the flat tensor, in a new tensor.

        Raises:
            UnreadableFileError: the file ends too early, or the system cannot read it.
        """
        stored = self.tensors[name]
        elements = torch.empty(stop - start, dtype=stored.dtype)
        wanted = memoryview(elements.view(torch.uint8).numpy().data)
        position = stored.offset + start * stored.dtype.itemsize
        while wanted:
            try:
                num_read = os.preadv(self._file.fileno(), [wanted], position)
            except OSError as error:
                raise UnreadableFileError(_first_line(error)) from error
            if num_read == 0:
                raise UnreadableFileError(f"it ends inside of tensor {name!r}")
            wanted, position = wanted[num_read:], position + num_read
        return elements


class BinFile:
    """A file of `torch.save`, memory-mapped; only tensors are loaded, never code.

    Args, Raises: as `SafetensorsFile`.
    """

    def __init__(self, path: Path) -> None:
        try:
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:  # torch.load raises whatever its unpickler meets
            raise UnreadableFileError(_first_line(error)) from error
        if not isinstance(content, dict):
            raise UnreadableFileError("it holds no dictionary of tensors")
        self._content = {name: tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}
        self.tensors = {
            name: StoredTensor(name, tensor.dtype, tuple(tensor.shape), 0) for name, tensor in self._content.items()
        }

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """As `SafetensorsFile.read`."""
        return self._content[name].detach().reshape(-1)[start:stop].clone()


WeightFile = SafetensorsFile | BinFile


def _first_line(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0] or type(error).__name__
