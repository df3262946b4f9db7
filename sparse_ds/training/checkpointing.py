"""Saving and going on: what `checkpoint` stores, collected from the Trainer, the optimizer and the run."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sparse_ds.checkpoint.folder import (
    TRAINER_STATE_FILE,
    Checkpoint,
    CheckpointIndex,
    CheckpointWriter,
    remove_old_checkpoints,
    writing_checkpoint,
)
from sparse_ds.checkpoint.zero3_state import StateItem, restore_items, save_items, state_items
from sparse_ds.config import RunConfig
from sparse_ds.distributed import process_group
from sparse_ds.distributed.zero3_partitions import MasterWeights
from sparse_ds.drop_grow.estimation import EstimationPhase
from sparse_ds.drop_grow.weight_states import WeightStates
from sparse_ds.model.base_checkpoint import BaseCheckpoint
from sparse_ds.optim.sm3 import SparseSM3
from sparse_ds.optim.sparse_adamw import SparseAdamW
from sparse_ds.sparse.sparse_linear import SparseLayer
from sparse_ds.training.setup import PreparedModel

if TYPE_CHECKING:
    from sparse_ds.training.trainer import SparseTrainer

ADAMW_STATES = ("exp_avg", "exp_avg_sq")


def run_identity(config: RunConfig, base: BaseCheckpoint, prepared: PreparedModel) -> dict[str, Any]:
    """What a checkpoint and the run that goes on from it must have in common, in plain JSON types."""
    return {
        "base_name": config.model.name_or_path,
        "base_revision": config.model.revision,
        "base_fingerprint": base.fingerprint(),
        "quantization": config.model.quantization,
        "double_quantization": config.model.double_quantization,
        "dtype": config.model.dtype,
        "method": config.method.name,
        "momentum": config.optimizer.momentum,
        "drop_criterion": config.method.drop_criterion,
        "redistribution_factor": config.method.redistribution_factor,
        "seed": config.train.seed,
        "task": config.model.task,
        "labels": None if prepared.classification is None else list(prepared.classification.labels),
        "active_weights": {name: layer.layout.num_active for name, layer in prepared.layers.items()},
    }


class RunCheckpoints:
    """Saves and restores one run.

    Args:
        config: the run.
        identity: `run_identity`.
        folder: output folder of the run.
        trainer: the run's Trainer.
        prepared: the run's model.
        device: where to gather.
    """

    def __init__(
        self,
        config: RunConfig,
        identity: dict[str, Any],
        folder: Path,
        trainer: SparseTrainer,
        prepared: PreparedModel,
        device: torch.device,
    ) -> None:
        self._identity, self._keep, self._folder = identity, config.checkpoint.keep, folder
        self._trainer, self._prepared, self._device = trainer, prepared, device

    def save(
        self,
        master: MasterWeights,
        weight_states: WeightStates | None,
        estimation: EstimationPhase | None,
        run_state: Mapping[str, Any],
    ) -> None:
        """Write `checkpoint-<step>`, then delete old ones.

        Before the one event of a method that selects once nothing has been trained, and nothing is saved.

        Args:
            master: the engine's master weights.
            weight_states: of the sparse values; None for `full`.
            estimation: the method's phases, if it has any.
            run_state: what the run wants back from `restore`, in plain JSON types.

        Collectives: the gathers of `save_items`, then an agreement on success; every rank must call it.

        Raises:
            UserError: writing failed (disk full); earlier checkpoints are untouched.
        """
        optimizer = _inner_optimizer(self._trainer)
        step = self._trainer.state.global_step
        if isinstance(optimizer, SparseAdamW) and optimizer.paused:
            return
        items = self._items(master, weight_states, estimation, optimizer)
        if process_group.rank() != 0:
            save_items(items, None, self._device)
            with process_group.agreement("saving a checkpoint"):
                return
        failure: Exception | None = None
        try:
            with writing_checkpoint(self._folder, step) as folder:
                writer = CheckpointWriter(folder)
                failure = save_items(items, writer, self._device)
                if failure is not None:
                    raise failure
                self._add_accumulators(optimizer, writer)
                self._trainer.state.save_to_json(str(folder / TRAINER_STATE_FILE))
                index = CheckpointIndex(
                    step=step,
                    identity=self._identity,
                    run_state={
                        **run_state,
                        "scheduler": self._trainer.lr_scheduler.state_dict(),
                        "adamw_step": _adamw_step(optimizer),
                        "num_active": {name: layer.num_active for name, layer in self._layers.items()},
                        "num_counted_steps": 0 if estimation is None else estimation.num_counted_steps,
                    },
                )
                writer.finish(index)
            remove_old_checkpoints(self._folder, self._keep)
        except Exception as error:
            failure = error
        with process_group.agreement(f"saving the checkpoint of step {step}"):
            if failure is not None:
                raise failure

    def restore(
        self,
        master: MasterWeights,
        weight_states: WeightStates | None,
        estimation: EstimationPhase | None,
        checkpoint: Checkpoint,
    ) -> None:
        """Take over tensors, optimizer state and learning rate. Every rank reads its own slices.

        Collectives: an agreement on success; every rank must call it. Gathered parameters must be released after it.
        """
        optimizer = _inner_optimizer(self._trainer)
        with process_group.agreement("restoring the checkpoint"):
            state = checkpoint.index.run_state
            if isinstance(optimizer, SparseSM3):
                optimizer.load_accumulators(
                    {
                        name: (checkpoint.read(f"{name}.row_accumulator"), checkpoint.read(f"{name}.col_accumulator"))
                        for name in optimizer.accumulator_names
                    }
                )
            elif isinstance(optimizer, SparseAdamW):
                optimizer.num_applied_steps = round(state["adamw_step"])
            else:
                _make_adamw_state(optimizer, master, float(state["adamw_step"]))
            for name, layer in self._layers.items():
                layer.num_active = state["num_active"][name]
            if estimation is not None and state["num_counted_steps"]:
                estimation.restore_phase(state["num_counted_steps"])
            states = _states(weight_states, optimizer, master)
            restore_items(self._items(master, weight_states, estimation, optimizer, states), checkpoint)
            if weight_states is not None:
                weight_states.write(states)
            scheduler = self._trainer.lr_scheduler
            scheduler.load_state_dict(checkpoint.index.run_state["scheduler"])
            for group, learning_rate in zip(optimizer.param_groups, scheduler.get_last_lr(), strict=True):
                group["lr"] = learning_rate

    @property
    def _layers(self) -> dict[str, SparseLayer]:
        return self._prepared.layers

    def _items(
        self,
        master: MasterWeights,
        weight_states: WeightStates | None,
        estimation: EstimationPhase | None,
        optimizer: torch.optim.Optimizer,
        states: Mapping[str, list[Tensor]] | None = None,
    ) -> list[StateItem]:
        if states is None:
            states = _states(weight_states, optimizer, master)
        items = state_items(self._layers, self._prepared.dense_parameters, master, states)
        for name, sums in ({} if estimation is None else estimation.saved_slices()).items():
            values = self._layers[name].values
            items.append(StateItem(f"{name}.candidates", values, sums.indices))
            items.append(StateItem(f"{name}.gradient_sum", values, sums.gradient))
            items.append(StateItem(f"{name}.gradient_square_sum", values, sums.gradient_square))
        return items

    def _add_accumulators(self, optimizer: torch.optim.Optimizer, writer: CheckpointWriter) -> None:
        if isinstance(optimizer, SparseSM3):
            for name in optimizer.accumulator_names:
                writer.add(f"{name}.row_accumulator", optimizer.row_accumulator(name))
                writer.add(f"{name}.col_accumulator", optimizer.col_accumulator(name))


def _inner_optimizer(trainer: SparseTrainer) -> torch.optim.Optimizer:
    optimizer: torch.optim.Optimizer = trainer.deepspeed.optimizer.optimizer
    return optimizer


def _states(
    weight_states: WeightStates | None, optimizer: torch.optim.Optimizer, master: MasterWeights
) -> dict[str, list[Tensor]]:
    if weight_states is not None:
        return weight_states.read()
    states = [optimizer.state[flat] for flat in master.flats]
    return {name: [state[name] for state in states] for name in ADAMW_STATES if all(name in state for state in states)}


def _adamw_step(optimizer: torch.optim.Optimizer) -> float:
    if isinstance(optimizer, SparseAdamW):
        return float(optimizer.num_applied_steps)
    steps = [float(state["step"]) for state in optimizer.state.values() if "step" in state]
    return steps[0] if steps else 0.0


def _make_adamw_state(optimizer: torch.optim.Optimizer, master: MasterWeights, step: float) -> None:
    for flat in master.flats:
        moments = {name: torch.zeros_like(flat, requires_grad=False) for name in ADAMW_STATES}
        optimizer.state[flat] = {"step": torch.tensor(step), **moments}
