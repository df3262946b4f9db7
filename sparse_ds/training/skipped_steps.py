"""Steps whose loss or gradient is not finite: skipped, counted, and after too many in a row the end of the run.

    rank 1's loss is NaN          its gradients are NaN, and so are the reduced ones and their global norm
    engine.step(), on all ranks   sees that the norm is not finite and applies nothing
    here, on all ranks            a `skipped` line in metrics.jsonl with the rows of the step; stop after N in a row

All ranks decide alike, since they decide by the same reduced norm; nothing further is sent. A skipped step counts as a
step of the run (its data is used up, events keep their times), but neither for the optimizer, nor for the learning
rate's schedule, nor for what an estimation phase measures.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparse_ds.config.errors import NON_FINITE_EXIT_CODE, RunStoppedError
from sparse_ds.monitor.metrics_log import MetricsLog
from sparse_ds.training.global_order import GlobalOrderSampler

if TYPE_CHECKING:
    from sparse_ds.training.trainer import SparseTrainer

logger = logging.getLogger("sparse_ds")

MAX_SHOWN_ROWS = 20
"""In messages; metrics.jsonl has all of them."""

RowsOfStep = Callable[[int], list[int | str]]


def with_gradient_of_its_kind(loss: Tensor) -> Tensor:
    """`loss`, bit for bit, such that a loss that is not finite has gradients that are not.

    An infinite loss can have a finite gradient (a label whose logit is minus infinity). The step would then be applied,
    although what is minimized has no value. Costs no synchronization with the device.
    """
    return loss * torch.where(torch.isfinite(loss.detach()), 1.0, torch.nan).to(loss.dtype)


def samples_of_step(sampler: GlobalOrderSampler, global_batch_size: int, step: int) -> list[int]:
    """The samples of one step of the epoch at which `sampler` is, in their order; the first step of the run is 1."""
    begin = (step - 1) % (len(sampler) // global_batch_size) * global_batch_size
    return list(islice(sampler, begin, begin + global_batch_size))


class SkippedSteps(TrainerCallback):
    """Counts the steps that the engine did not apply.

    Args:
        trainer: the run's Trainer.
        log: of the run.
        rows_of_step: rows of the training data, counted from 0 as in its source or as text, that make up a step (the
            first is 1).
        max_in_a_row: so many end the run.
    """

    def __init__(self, trainer: SparseTrainer, log: MetricsLog, rows_of_step: RowsOfStep, max_in_a_row: int) -> None:
        self._trainer, self._log, self._rows_of_step, self._max_in_a_row = trainer, log, rows_of_step, max_in_a_row
        self.num_skipped = 0
        """Of the whole run, the part before a resumed checkpoint included."""
        self.num_in_a_row = 0

    def saved_state(self) -> dict[str, Any]:
        """For a checkpoint, in plain JSON types."""
        return {"num_skipped": self.num_skipped, "num_in_a_row": self.num_in_a_row}

    def restore_state(self, state: dict[str, Any]) -> None:
        """Take over what `saved_state` returned."""
        self.num_skipped, self.num_in_a_row = int(state["num_skipped"]), int(state["num_in_a_row"])

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._trainer.deepspeed.was_step_applied():
            self.num_in_a_row = 0
            return
        self.num_skipped += 1
        self.num_in_a_row += 1
        step = state.global_step + 1
        rows = self._rows_of_step(step)
        counts = {"num_in_a_row": self.num_in_a_row, "num_skipped": self.num_skipped}
        self._log.write("skipped", {"step": step, **counts, "rows": rows})
        shown = ", ".join(map(str, rows[:MAX_SHOWN_ROWS])) + (", ..." if len(rows) > MAX_SHOWN_ROWS else "")
        logger.warning(
            "step %d is skipped on all ranks: its loss or gradient is not finite (%d in a row, %d in all); rows of the "
            "training data: %s",
            step,
            self.num_in_a_row,
            self.num_skipped,
            shown,
        )
        if self.num_in_a_row >= self._max_in_a_row:
            raise RunStoppedError(
                f"train.max_skipped_steps: the loss or gradient of {self.num_in_a_row} steps in a row was not finite, "
                f"the last of them step {step} with rows {shown} of the training data (counted from 0). Look at these "
                "rows, lower optimizer.learning_rate, or go on from an earlier checkpoint.",
                NON_FINITE_EXIT_CODE,
            )
