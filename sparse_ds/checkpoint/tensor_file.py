"""One safetensors file, written tensor by tensor and hashed on the way.

    8 bytes     length of the header, little-endian
    header      JSON: name -> dtype, shape, place in the data; filled up with spaces to a multiple of 8 bytes
    data        the tensors one after the other, wide dtypes first, so that each begins at a multiple of its item size

`safetensors.torch.save_file` takes whole dictionaries of tensors in memory and refuses views of one storage, which the
slices of an engine's flat tensors are; its file would have to be read again to be hashed; and it tells a full disk by
text only. Reading is left to the library.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {torch.float32: "F32", torch.int32: "I32", torch.int64: "I64", torch.uint8: "U8"}
"""Of the tensors of a checkpoint, by safetensors' names."""
_WRITE_BYTES = 2**26


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> str:
    """Write a new file and flush it to disk.

    Args:
        path: must not exist.
        tensors: 1-D, of the dtypes above, on any device; views of one storage are allowed.

    Returns:
        sha256 of the file.

    Memory: one tensor on the host, where it is not there already.

    Raises:
        OSError: the file cannot be written.
    """
    order = sorted(tensors, key=lambda name: -tensors[name].element_size())
    digest = hashlib.sha256()
    with path.open("xb") as file:
        for piece in _header(tensors, order):
            file.write(piece)
            digest.update(piece)
        for name in order:
            content = tensors[name].detach().cpu().contiguous().view(torch.uint8).numpy().data
            for begin in range(0, len(content), _WRITE_BYTES):
                file.write(content[begin : begin + _WRITE_BYTES])
                digest.update(content[begin : begin + _WRITE_BYTES])
        file.flush()
        os.fsync(file.fileno())
    return digest.hexdigest()


def _header(tensors: Mapping[str, Tensor], order: list[str]) -> tuple[bytes, bytes]:
    content: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in order:
        tensor = tensors[name]
        assert tensor.dim() == 1, f"{name}: shape {tuple(tensor.shape)}, expected one dimension"
        begin, end = end, end + tensor.numel() * tensor.element_size()
        content[name] = {"dtype": DTYPES[tensor.dtype], "shape": [tensor.numel()], "data_offsets": [begin, end]}
    header = json.dumps(content, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little"), header
