"""The step at which each weight's age was 0, in no byte, one byte or four bytes a weight.

Weights are born together: all at the start, some at every event. So there are few birth steps, and a weight needs only
the number of its cohort in the table of them.
"""

from __future__ import annotations

import torch
from torch import Tensor

_CHUNK_ELEMENTS = 1 << 20
# Birth steps this far apart get their cohorts by a table with an entry for each step in between (64 MB).
_TABLE_STEPS = 1 << 23


class BirthSteps:
    """Birth steps of the elements of one flat tensor; 0 to begin with.

    Memory: nothing while all are equal; 1 byte an element with up to 256 different ones, 4 bytes with more.

    Args:
        like: the flat tensor.
    """

    def __init__(self, like: Tensor) -> None:
        self._shape, self._device = like.shape, like.device
        self.steps: list[int] = [0]
        """Birth step of each cohort, ascending."""
        self.cohorts: Tensor | None = None
        """uint8 or int32 like the flat tensor: an index into `steps`; None where there is one cohort."""

    def read(self) -> Tensor:
        """int32 like the flat tensor, a copy."""
        if self.cohorts is None:
            return torch.full(self._shape, self.steps[0], dtype=torch.int32, device=self._device)
        steps = torch.tensor(self.steps, dtype=torch.int32, device=self._device)
        return steps.index_select(0, self.cohorts.view(-1).int()).view(self._shape)

    def take(self, steps: list[int], cohorts: Tensor | None) -> None:
        """Take over `steps` and `cohorts` of another one (of any number dtype)."""
        self.steps = steps
        self.cohorts = None if cohorts is None else cohorts.to(_cohort_dtype(len(steps)))

    def write(self, birth_steps: Tensor) -> None:
        """Take over integers like the flat tensor.

        One device synchronization. Memory: transient 16 bytes an element of a chunk of a million, and 8 bytes for
        each step between the first birth and the last.
        """
        flat = birth_steps.reshape(-1)
        self.cohorts = None
        if flat.numel() == 0:
            self.steps = [0]
            return
        first, last = (int(end) for end in flat.aminmax())
        self.steps = _distinct(flat, first, last)
        if len(self.steps) == 1:
            return
        table = torch.tensor(self.steps, dtype=torch.int32, device=flat.device)
        dtype = _cohort_dtype(len(self.steps))
        self.cohorts = torch.empty(self._shape, dtype=dtype, device=flat.device)
        cohorts = self.cohorts.view(-1)
        for begin in range(0, flat.numel(), _CHUNK_ELEMENTS):
            chunk = slice(begin, begin + _CHUNK_ELEMENTS)
            cohorts[chunk] = torch.searchsorted(table, flat[chunk].int(), out_int32=True).to(dtype)


def _cohort_dtype(num_cohorts: int) -> torch.dtype:
    return torch.uint8 if num_cohorts <= 256 else torch.int32


def _distinct(flat: Tensor, first: int, last: int) -> list[int]:
    """The different values of integers from `first` to `last`, ascending."""
    if last - first >= _TABLE_STEPS:
        return [int(step) for step in torch.unique(flat).tolist()]
    occurs = torch.zeros(last - first + 1, dtype=torch.bool, device=flat.device)
    for begin in range(0, flat.numel(), _CHUNK_ELEMENTS):
        occurs[(flat[begin : begin + _CHUNK_ELEMENTS] - first).long()] = True
    return [first + int(offset) for offset in occurs.nonzero().view(-1).tolist()]
