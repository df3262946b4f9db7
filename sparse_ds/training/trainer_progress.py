"""How far the Trainer is: its schedule, sums, random generators and callbacks, saved and restored.

transformers saves the rest of its state itself, as trainer_state.json.
"""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor
from transformers import TrainerState, set_seed

from sparse_ds.checkpoint.index import TRAINER_STATE_FILE
from sparse_ds.checkpoint.random_generators import CUDA_GENERATOR, read_generators, write_generators
from sparse_ds.checkpoint.reading import Checkpoint
from sparse_ds.checkpoint.writing import SavedSlice
from sparse_ds.checkpoint.zero3_state import check_entry, find_problem
from sparse_ds.config import UserError
from sparse_ds.distributed import process_group

if TYPE_CHECKING:
    from sparse_ds.training.trainer import SparseTrainer

ROW_PREFIX = "ranks/"
"""Of tensors with one row per rank; no module's name has a slash."""
LOSS_SUM, NUM_TOKENS, NUM_PAIRS = (f"{ROW_PREFIX}{name}" for name in ("loss_sum", "num_tokens", "num_pairs"))
MOST_TOKENS = 2**48


@runtime_checkable
class SavedCallback(Protocol):
    """A callback of the Trainer with numbers of its own that a resumed run goes on with."""

    def saved_state(self) -> dict[str, Any]:
        """Plain JSON types."""
        ...

    def restore_state(self, state: dict[str, Any]) -> None:
        """Take over what `saved_state` returned; the file may have come from anywhere.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        ...


class TrainerCounters(BaseModel):
    """What a checkpoint must hold of the Trainer besides tensors and trainer_state.json."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    epoch: int
    """Whole passes over the data."""
    step_in_epoch: int
    """With `epoch` the place in the data: a function of step, data and global batch."""
    last_logged_step: int
    scheduler: dict[str, Any]
    """State of torch's LambdaLR."""
    callbacks: dict[str, dict[str, Any]]
    """Class name -> state of each `SavedCallback`."""


class TrainerProgress:
    """Reads and writes the Trainer's part of a checkpoint.

    Args:
        trainer: the run's, after `train` has begun.
        seed: of the run.
        steps_per_epoch: optimizer steps of one pass over the data.
    """

    def __init__(self, trainer: SparseTrainer, seed: int, steps_per_epoch: int) -> None:
        self._trainer, self._seed, self._steps_per_epoch = trainer, seed, steps_per_epoch
        self._device: torch.device = trainer.args.device
        self._generators: dict[str, Tensor] = {}

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return int(self._trainer.state.global_step)

    def counters(self) -> TrainerCounters:
        """As they are between two steps."""
        epoch, step_in_epoch = divmod(self.step, self._steps_per_epoch)
        callbacks = self._trainer.callback_handler.callbacks
        return TrainerCounters(
            epoch=epoch,
            step_in_epoch=step_in_epoch,
            last_logged_step=self._trainer.last_logged_step,
            scheduler=self._trainer.lr_scheduler.state_dict(),
            callbacks={
                type(each).__name__: each.saved_state() for each in callbacks if isinstance(each, SavedCallback)
            },
        )

    def slices(self) -> list[SavedSlice]:
        """What belongs to this data-parallel position: one row of each tensor."""
        rows = {ROW_PREFIX + name: state for name, state in read_generators(self._device).items()}
        rows[LOSS_SUM] = self._trainer.loss_sum.detach().float().view(1).cpu()
        rows[NUM_TOKENS], rows[NUM_PAIRS] = self._trainer.uncounted_work.cpu().long().view(2, 1)
        return [SavedSlice.of_row(name, row) for name, row in rows.items()]

    def state_text(self) -> str:
        """The text of trainer_state.json, as `TrainerState.save_to_json` writes it."""
        return json.dumps(asdict(self._trainer.state), indent=2, sort_keys=True) + "\n"

    def restore(self, checkpoint: Checkpoint, counters: TrainerCounters) -> set[str]:
        """Take over everything but the random generators, see `restore_generators`. Collectives: none.

        Returns:
            Names of the tensors that belong to the Trainer.

        Raises:
            UserError: something does not fit this run.
        """
        self._check_position(checkpoint, counters)
        names = self._restore_sums(checkpoint, counters.last_logged_step) | self._read_generators(checkpoint)
        self._restore_scheduler(checkpoint, counters.scheduler)
        self._restore_callbacks(checkpoint, counters.callbacks)
        # Intervals are those of the configuration, not of the checkpoint.
        self._trainer.state.compute_steps(self._trainer.args, self._trainer.state.max_steps)
        return names

    def restore_generators(self) -> None:
        """Set the random generators back: before the first forward pass, after the data loader has drawn its seed.

        With another number of ranks they begin anew from (seed, step, rank). Collectives: none.
        """
        if self._generators:
            write_generators(self._generators, self._device)
        else:
            set_seed((self._seed + 1_000_003 * self.step + process_group.rank()) % 2**32)

    def _check_position(self, checkpoint: Checkpoint, counters: TrainerCounters) -> None:
        step = checkpoint.index.step
        position = divmod(step, self._steps_per_epoch)
        if (counters.epoch, counters.step_in_epoch) != position or not 0 <= counters.last_logged_step <= step:
            raise UserError(
                f"checkpoint {checkpoint.folder}: stands at step {counters.step_in_epoch} of epoch {counters.epoch}, "
                f"with step {counters.last_logged_step} logged; expected step {position[1]} of epoch {position[0]} by "
                "the data of this run."
            )

    def _restore_sums(self, checkpoint: Checkpoint, last_logged_step: int) -> set[str]:
        """Loss (a mean over ranks), tokens and pairs (sums over ranks) since the last log line."""
        saved_ranks, rank = checkpoint.index.num_state_files, process_group.rank()
        check_entry(checkpoint, LOSS_SUM, torch.float32, saved_ranks)
        losses = checkpoint.read(LOSS_SUM)
        # A checkpoint of a time before pairs were counted has none.
        counted = [name for name in (NUM_TOKENS, NUM_PAIRS) if name == NUM_TOKENS or name in checkpoint.names]
        work = torch.zeros(2, saved_ranks, dtype=torch.int64)
        for row, name in zip(work, counted, strict=False):
            check_entry(checkpoint, name, torch.int64, saved_ranks)
            row.copy_(checkpoint.read(name))
            problem = find_problem(row, limit=MOST_TOKENS)
            if problem:
                raise UserError(f"checkpoint {checkpoint.folder}: tensor {name!r} {problem}. Use another checkpoint.")
        if saved_ranks == process_group.world_size():
            self._trainer.set_sums(float(losses[rank]), work[:, rank], last_logged_step)
        else:
            self._trainer.set_sums(float(losses.mean()), work.sum(1) * (rank == 0), last_logged_step)
        return {LOSS_SUM, *counted}

    def _read_generators(self, checkpoint: Checkpoint) -> set[str]:
        num_ranks, rank = process_group.world_size(), process_group.rank()
        current = read_generators(self._device)
        # A run may go on on another kind of device, which has other generators.
        names = {ROW_PREFIX + name for name in (*current, CUDA_GENERATOR)} & checkpoint.names
        if checkpoint.index.num_state_files == num_ranks and names.issuperset(ROW_PREFIX + name for name in current):
            for name, row in current.items():
                check_entry(checkpoint, ROW_PREFIX + name, row.dtype, row.numel() * num_ranks)
                self._generators[name] = checkpoint.read(ROW_PREFIX + name, rank * row.numel(), row.numel())
            try:
                write_generators(self._generators, self._device)
            except (ValueError, RuntimeError) as error:
                raise UserError(
                    f"checkpoint {checkpoint.folder}: the state of a random generator is damaged ({error})."
                ) from error
        return names

    def _restore_scheduler(self, checkpoint: Checkpoint, saved: dict[str, Any]) -> None:
        scheduler = self._trainer.lr_scheduler
        current = scheduler.state_dict()
        if saved.keys() != current.keys() or not all(_has_form(saved[key], current[key]) for key in current):
            raise UserError(f"checkpoint {checkpoint.folder}: its schedule is not of the kind of this run's.")
        # The place in the schedule is the checkpoint's, the rate and the length of the schedule are this run's.
        scheduler.load_state_dict({**saved, "base_lrs": current["base_lrs"]})
        rates = [
            base_rate * factor(scheduler.last_epoch)
            for base_rate, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        ]
        scheduler._last_lr = rates
        for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def _restore_callbacks(self, checkpoint: Checkpoint, saved: dict[str, dict[str, Any]]) -> None:
        for callback in self._trainer.callback_handler.callbacks:
            name = type(callback).__name__
            if not isinstance(callback, SavedCallback) or name not in saved:
                continue
            try:
                callback.restore_state(saved[name])
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(f"checkpoint {checkpoint.folder}: what it holds of {name} is not of a run.") from error


def check_trainer_state(checkpoint: Checkpoint) -> None:
    """transformers will be able to read its part. Collectives: none.

    Raises:
        UserError: it is something else, or of another step.
    """
    try:
        state = TrainerState.load_from_json(str(checkpoint.folder / TRAINER_STATE_FILE))
        is_fine = state.global_step == checkpoint.index.step and 0 <= float(state.epoch) <= state.global_step
    except (OSError, TypeError, ValueError, RecursionError):
        is_fine = False
    if not is_fine:
        raise UserError(f"checkpoint {checkpoint.folder}: {TRAINER_STATE_FILE} is not what a run writes.")


def _has_form(value: Any, example: Any) -> bool:
    """Whether a JSON value can stand where the example is: the same types, in lists as well."""
    if isinstance(example, list):
        return (
            isinstance(value, list)
            and len(value) == len(example)
            and all(_has_form(*pair) for pair in zip(value, example, strict=True))
        )
    if isinstance(example, bool) or isinstance(value, bool) or not isinstance(example, int | float):
        return type(value) is type(example)
    return isinstance(value, int | float)
