"""Everything of an engine that trains, as tensors to save and as counters: independent of rank and world size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from torch.nn import Parameter

from sparse_ds.checkpoint.reading import Checkpoint
from sparse_ds.checkpoint.writing import SavedSlice
from sparse_ds.checkpoint.zero3_state import StateItem, check_entry, find_problem, restore_items, state_items
from sparse_ds.config.errors import UserError
from sparse_ds.distributed.zero3_partitions import MasterWeights
from sparse_ds.drop_grow.estimation import EstimationPhase
from sparse_ds.drop_grow.weight_states import WeightStates
from sparse_ds.optim.sm3 import SparseSM3
from sparse_ds.optim.sparse_adamw import SparseAdamW
from sparse_ds.sparse.sparse_linear import SparseLayer

ADAMW_STATES = ("exp_avg", "exp_avg_sq")


class EngineCounters(BaseModel):
    """What a checkpoint must hold of an engine besides tensors."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    num_applied_steps: int
    """Of AdamW; 0 for SM3."""
    num_active: dict[str, int]
    """Active weights of every sparse layer."""
    num_counted_steps: int
    """Of the estimation phase that is going on; 0 outside of one."""


@dataclass(frozen=True)
class EngineState:
    """The parts of a run that hold what trains.

    Attributes:
        layers: sparse layers by module name, in the same order on every rank.
        dense: parameters that train as a whole, by name.
        master: the engine's master weights.
        optimizer: the inner optimizer, bound.
        weight_states: of the sparse values; None for `full`.
        estimation: the method's phases, if it has any.
    """

    layers: Mapping[str, SparseLayer]
    dense: Mapping[str, Parameter]
    master: MasterWeights
    optimizer: torch.optim.Optimizer
    weight_states: WeightStates | None = None
    estimation: EstimationPhase | None = None

    @property
    def is_paused(self) -> bool:
        """Nothing has been trained yet: a method that selects once is measuring before its event."""
        is_measuring = self.estimation is not None and self.estimation.is_running
        return isinstance(self.optimizer, SparseAdamW) and self.optimizer.paused and is_measuring

    def counters(self) -> EngineCounters:
        """As they are between two steps."""
        return EngineCounters(
            num_applied_steps=self._num_applied_steps(),
            num_active={name: layer.num_active for name, layer in self.layers.items()},
            num_counted_steps=0 if self.estimation is None else self.estimation.num_counted_steps,
        )

    def slices(self, step: int) -> list[SavedSlice]:
        """This rank's part of all tensors; views where the state is fp32. `step`: optimizer steps done.

        Memory: 8 bytes per weight of this rank's part where moments are stored in fewer bits, 4 where indices are.
        Collectives: none; with compact indices those of `own_indices`, and every rank must call it.
        """
        saved = [item.saved() for item in self._items(self._states(), step, to_restore=False)]
        if isinstance(self.optimizer, SparseSM3):
            for name in self.optimizer.accumulator_names:
                pair = self.optimizer.row_accumulator(name), self.optimizer.col_accumulator(name)
                for kind, accumulator in zip(("row_accumulator", "col_accumulator"), pair, strict=True):
                    saved.append(SavedSlice.of_replicated(f"{name}.{kind}", accumulator))
        return saved

    def restore(self, checkpoint: Checkpoint, counters: EngineCounters) -> set[str]:
        """Take over tensors and counters; every rank reads its own slices. Release gathered parameters after it.

        Returns:
            Names of the tensors that belong to the engine.

        Collectives: none.

        Raises:
            UserError: something does not fit this run; it must end then.
        """
        step = checkpoint.index.step
        self._check_counters(checkpoint, counters)
        for name, layer in self.layers.items():
            layer.num_active = counters.num_active[name]
            layer.indices_changed()
        names: set[str] = set()
        if isinstance(self.optimizer, SparseSM3):
            for name in self.optimizer.accumulator_names:
                names |= {f"{name}.row_accumulator", f"{name}.col_accumulator"}
            self.optimizer.load_accumulators(self._read_accumulators(self.optimizer, checkpoint))
        elif isinstance(self.optimizer, SparseAdamW):
            self.optimizer.num_applied_steps = counters.num_applied_steps
        else:
            _make_adamw_state(self.optimizer, self.master, counters.num_applied_steps)
        if self.estimation is not None and counters.num_counted_steps:
            self.estimation.restore_phase(counters.num_counted_steps)
        states = self._states()
        items = self._items(states, step, to_restore=True)
        restore_items(items, checkpoint)
        for layer in self.layers.values():
            layer.indices_changed()
        if self.weight_states is not None:
            self.weight_states.write(dict(states))
        return names | {item.name for item in items}

    def _read_accumulators(self, optimizer: SparseSM3, checkpoint: Checkpoint) -> dict[str, tuple[Tensor, Tensor]]:
        found = {}
        for name in optimizer.accumulator_names:
            sizes = optimizer.row_accumulator(name).numel(), optimizer.col_accumulator(name).numel()
            row = _read_accumulator(checkpoint, f"{name}.row_accumulator", sizes[0])
            found[name] = row, _read_accumulator(checkpoint, f"{name}.col_accumulator", sizes[1])
        return found

    def _check_counters(self, checkpoint: Checkpoint, counters: EngineCounters) -> None:
        step = checkpoint.index.step
        problem = None
        if counters.num_active.keys() != self.layers.keys():
            problem = "names other layers"
        elif not 0 <= counters.num_applied_steps <= step:
            problem = f"counts {counters.num_applied_steps} applied steps of {step}"
        elif not 0 <= counters.num_counted_steps <= step or (counters.num_counted_steps and self.estimation is None):
            problem = f"counts {counters.num_counted_steps} steps of an estimation phase"
        total = sum(layer.layout.num_active for layer in self.layers.values())
        if problem is None and sum(counters.num_active.values()) != total:
            problem = f"has {sum(counters.num_active.values())} active weights, expected {total}"
        for name, layer in self.layers.items():
            number, num_slots = counters.num_active.get(name, 0), layer.layout.num_slots
            least = 0 if layer.layout.spare_slots else num_slots
            if problem is None and number % layer.layout.block_elements:
                problem = f"has {number} active weights of {name}, expected whole blocks"
            if problem is None and not least <= number <= num_slots:
                problem = f"has {number} active weights of {name}, expected {least} to {num_slots}"
        if problem:
            raise UserError(f"checkpoint {checkpoint.folder}: {problem}. Use another checkpoint.")

    def _items(self, states: Mapping[str, list[Tensor]], step: int, *, to_restore: bool) -> list[StateItem]:
        items = state_items(self.layers, self.dense, self.master, states, step, to_restore=to_restore)
        for name, sums in ({} if self.estimation is None else self.estimation.saved_slices()).items():
            values, layout = self.layers[name].values, self.layers[name].layout
            size = layout.num_slots
            items.append(
                StateItem(
                    f"{name}.candidates",
                    values,
                    sums.indices,
                    layout.grid.num_slots,
                    limit=layout.num_positions,
                    ascending=True,
                    unit=layout.block_elements,
                )
            )
            items.append(StateItem(f"{name}.gradient_sum", values, sums.gradient, size))
            items.append(StateItem(f"{name}.gradient_square_sum", values, sums.gradient_square, size))
        return items

    def _states(self) -> Mapping[str, list[Tensor]]:
        if self.weight_states is not None:
            return self.weight_states.read()
        if not all(name in self.optimizer.state[flat] for flat in self.master.flats for name in ADAMW_STATES):
            # No step has been applied yet; torch would make the same at the first one.
            _make_adamw_state(self.optimizer, self.master, 0)
        return {name: [self.optimizer.state[flat][name] for flat in self.master.flats] for name in ADAMW_STATES}

    def _num_applied_steps(self) -> int:
        if isinstance(self.optimizer, SparseSM3):
            return 0
        if isinstance(self.optimizer, SparseAdamW):
            return self.optimizer.num_applied_steps
        steps = [int(state["step"]) for state in self.optimizer.state.values() if "step" in state]
        return steps[0] if steps else 0


def _read_accumulator(checkpoint: Checkpoint, name: str, num_elements: int) -> Tensor:
    check_entry(checkpoint, name, torch.float32, num_elements)
    accumulator = checkpoint.read(name)
    problem = find_problem(accumulator) or ("holds numbers below 0" if bool((accumulator < 0).any()) else None)
    if problem:
        raise UserError(f"checkpoint {checkpoint.folder}: tensor {name!r} {problem}. Use another checkpoint.")
    return accumulator


def _make_adamw_state(optimizer: torch.optim.Optimizer, master: MasterWeights, num_steps: int) -> None:
    for flat in master.flats:
        moments = {name: torch.zeros_like(flat, requires_grad=False) for name in ADAMW_STATES}
        optimizer.state[flat] = {"step": torch.tensor(float(num_steps)), **moments}
