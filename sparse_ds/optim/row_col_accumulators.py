"""Row and column statistics of many matrices in one flat buffer, so that one collective merges them across ranks."""

from __future__ import annotations

import torch
from torch import Tensor


class RowColAccumulators:
    """For each matrix [rows] + [cols] fp32 numbers, all matrices joined in one buffer, in two versions.

    Layout: `| rows of A | cols of A | rows of B | cols of B | ...`, in the order in which tensors were added (which
    must therefore be the same on all ranks). `committed` is what everybody reads during a step, `pending` what they
    write: so the result does not depend on how the tensors are cut into slices, nor on the order of the slices.

    Memory: 2 x 4 bytes per row and column, on one device, replicated on all ranks.
    """

    def __init__(self) -> None:
        self.committed = torch.zeros(0)
        self.pending = torch.zeros(0)
        self._shapes: dict[str, tuple[int, int]] = {}
        self._offsets: dict[str, int] = {}

    @property
    def shapes(self) -> dict[str, tuple[int, int]]:
        """(num_rows, num_cols) by name, in the order of the buffer."""
        return dict(self._shapes)

    def add(self, shapes: dict[str, tuple[int, int]], device: torch.device) -> None:
        """Make room (zeros) for the tensors that are not there yet. Views taken before become stale.

        Raises:
            RuntimeError: the device differs from that of the tensors added before.
        """
        if self._shapes and device != self.committed.device:
            raise RuntimeError(
                f"accumulators live on {self.committed.device}, got a flat tensor on {device}: "
                "all flat tensors of one optimizer must be on the same device"
            )
        size = self.committed.numel()
        for name, shape in shapes.items():
            if name in self._shapes:
                assert self._shapes[name] == shape, f"{name!r}: registered as {self._shapes[name]}, now {shape}"
                continue
            self._shapes[name], self._offsets[name] = shape, size
            size += sum(shape)
        room = torch.zeros(size - self.committed.numel(), device=device)
        self.committed = torch.cat([self.committed.to(device), room])
        self.pending = torch.cat([self.pending.to(device), room])

    def offset(self, name: str) -> int:
        """Where in the buffer the rows of one tensor begin; its columns follow them."""
        return self._offsets[name]

    def split(self, name: str, buffer: Tensor) -> tuple[Tensor, Tensor]:
        """Views `(row [num_rows], col [num_cols])` of one tensor in `buffer` (`committed` or `pending`)."""
        offset, (num_rows, num_cols) = self._offsets[name], self._shapes[name]
        return buffer[offset : offset + num_rows], buffer[offset + num_rows : offset + num_rows + num_cols]

    def commit(self) -> None:
        """Make `pending` the values that are read from now on."""
        self.committed.copy_(self.pending)

    def state_dict(self) -> dict[str, tuple[Tensor, Tensor]]:
        """Copies of the committed `(row, col)` by name: independent of rank, world size and registration order."""
        pairs = {name: self.split(name, self.committed) for name in self._shapes}
        return {name: (row.clone(), col.clone()) for name, (row, col) in pairs.items()}

    def load_state_dict(self, state: dict[str, tuple[Tensor, Tensor]]) -> None:
        """Take over what `state_dict` returned; `pending` becomes the same.

        Raises:
            RuntimeError: the saved tensors are not the registered ones.
        """
        saved = {name: (row.numel(), col.numel()) for name, (row, col) in state.items()}
        differing = sorted(name for name in {*saved, *self._shapes} if saved.get(name) != self._shapes.get(name))
        if differing:
            raise RuntimeError(
                f"saved accumulators do not fit: {len(differing)} tensors differ, for example {differing[0]!r}: "
                f"saved (rows, cols) {saved.get(differing[0])}, registered {self._shapes.get(differing[0])}. "
                "Register the flat tensors before loading, and load the state of the same model and target modules."
            )
        for name, (saved_row, saved_col) in state.items():
            row, col = self.split(name, self.committed)
            row.copy_(saved_row)
            col.copy_(saved_col)
        self.pending.copy_(self.committed)
