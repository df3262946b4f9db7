"""A checkpoint that is read: its files checked, and any range of any tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparse_ds.checkpoint.index import INDEX_FILE, TRAINER_STATE_FILE, TensorEntry, read_index, sha256_of_file
from sparse_ds.checkpoint.tensor_file import DTYPES
from sparse_ds.config.errors import UserError

TORCH_DTYPES = {name: dtype for dtype, name in DTYPES.items()}


class Checkpoint:
    """A checkpoint folder whose index has been checked; its files are by `verify`.

    Raises:
        UserError: see `read_index`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = read_index(folder)
        self._open_files: dict[str, Any] = {}

    def verify(self, share: int = 0, num_shares: int = 1) -> None:
        """Check every byte of the files, and that each holds what the index says; or of a share of the files.

        Args:
            share: this rank, of `num_shares` ranks that together check all.

        Raises:
            UserError: a file is missing, a link, damaged (sha256) or does not hold what it should.
        """
        for number, name in enumerate([*self.index.state_files, TRAINER_STATE_FILE]):
            path = self.folder / name
            # A link may lead anywhere; nothing that is written here is one.
            if path.is_symlink() or not path.is_file():
                raise UserError(f"checkpoint {self.folder}: {name} is missing. Use another checkpoint.")
            if number % num_shares != share:
                continue
            if self._sha256(name) != self.index.files[name]:
                raise UserError(
                    f"checkpoint {self.folder}: {name} is damaged (its sha256 is not the one in {INDEX_FILE}). Use "
                    "another checkpoint."
                )
            if name != TRAINER_STATE_FILE:
                self._check_content(number)

    @property
    def names(self) -> set[str]:
        """All tensors."""
        return set(self.index.tensors)

    def entry(self, name: str) -> TensorEntry:
        """Size and slicing of one tensor.

        Raises:
            UserError: there is none of that name.
        """
        if name not in self.index.tensors:
            raise UserError(f"checkpoint {self.folder}: tensor {name!r} is missing; it was written by another run.")
        return self.index.tensors[name]

    def read(self, name: str, start: int = 0, num_elements: int | None = None) -> Tensor:
        """Elements [start, start + num_elements) of a tensor, all of it by default; only these are read.

        Memory: the result; the files are mapped.
        """
        entry = self.entry(name)
        end = entry.num_elements if num_elements is None else start + num_elements
        assert 0 <= start <= end <= entry.num_elements, f"{name}: [{start}, {end}) of {entry.num_elements}"
        pieces = [torch.empty(0, dtype=TORCH_DTYPES[entry.dtype])]
        for file in range(start // entry.slice_elements, -(-end // entry.slice_elements) if end > start else 0):
            first, length = entry.slice_of_file(file)
            content = self._open(self.index.state_files[file]).get_slice(name)
            pieces.append(content[max(start - first, 0) : min(end - first, length)])
        return torch.cat(pieces)

    def close(self) -> None:
        """Close the files that were read from; they are opened again when they are needed."""
        for file in self._open_files.values():
            file.__exit__(None, None, None)
        self._open_files = {}

    def _check_content(self, number: int) -> None:
        """Every tensor of a file has the name, dtype and size that the index gives it, and no other is there."""
        name = self.index.state_files[number]
        sizes = {tensor: entry.slice_of_file(number)[1] for tensor, entry in self.index.tensors.items()}
        expected = {tensor: (self.index.tensors[tensor].dtype, [size]) for tensor, size in sizes.items() if size}
        file = self._open(name)
        slices = {tensor: file.get_slice(tensor) for tensor in file.keys()}  # noqa: SIM118 (it is no mapping)
        found = {tensor: (piece.get_dtype(), piece.get_shape()) for tensor, piece in slices.items()}
        if found != expected:
            wrong = sorted(tensor for tensor in found.keys() | expected if found.get(tensor) != expected.get(tensor))[0]
            raise UserError(
                f"checkpoint {self.folder}: {name} holds {found.get(wrong, 'nothing')} of tensor {wrong!r}, expected "
                f"{expected.get(wrong, 'nothing')}. Use another checkpoint."
            )

    def _open(self, name: str) -> Any:
        if name not in self._open_files:
            try:
                self._open_files[name] = safe_open(self.folder / name, framework="pt")
            except (SafetensorError, OSError) as error:
                raise UserError(f"checkpoint {self.folder}: {name} cannot be read ({error}).") from error
        return self._open_files[name]

    def _sha256(self, name: str) -> str:
        try:
            return sha256_of_file(self.folder / name)
        except OSError as error:
            raise UserError(f"checkpoint {self.folder}: {name} cannot be read ({error.strerror}).") from error
