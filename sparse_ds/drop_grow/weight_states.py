"""State per active weight that events and checkpoints move with the weights.

Each state is a list of flat tensors like `MasterWeights.flats`. The optimizer owns most of them; two more exist with
every optimizer:

    birth_step      int32   applied steps at which the weight's age was 0 (SparseAdamW has its own); kept compressed
    event_value     fp32    the value right after the last event, only where `drop_criterion` is `change`
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor

from sparse_ds.optim.birth_steps import BirthSteps

States = dict[str, list[Tensor]]


class HasWeightStates(Protocol):
    """What an optimizer of sparse values offers."""

    def read_weight_states(self) -> States:
        """Name -> one tensor per flat; writing into them and calling `write_weight_states` changes the state."""
        ...

    def write_weight_states(self, states: Mapping[str, list[Tensor]]) -> None:
        """Take over what `read_weight_states` returned, changed in place or not."""
        ...


class WeightStates:
    """All states of a run.

    Args:
        optimizer: the inner optimizer.
        flats: the master weights.
        keeps_event_values: the change since the last event decides what is dropped.
    """

    def __init__(self, optimizer: HasWeightStates, flats: list[Tensor], *, keeps_event_values: bool) -> None:
        self._optimizer = optimizer
        self._own: States = {}
        self._births: list[BirthSteps] | None = None
        if "birth_step" not in optimizer.read_weight_states():
            self._births = [BirthSteps(flat) for flat in flats]
        if keeps_event_values:
            self._own["event_value"] = [torch.zeros_like(flat, requires_grad=False) for flat in flats]

    def read(self) -> States:
        """All states by name, in the same order on every rank. Memory: copies where the optimizer compresses them."""
        births = {} if self._births is None else {"birth_step": [birth.read() for birth in self._births]}
        return {**self._optimizer.read_weight_states(), **births, **self._own}

    def write(self, states: States) -> None:
        """Take over what `read` returned, changed in place."""
        for births, birth_steps in zip(self._births or [], states["birth_step"], strict=self._births is not None):
            births.write(birth_steps)
        self._optimizer.write_weight_states({name: flats for name, flats in states.items() if name not in self._own})
