"""The training ends when the held-out loss has stopped falling, decided once for all ranks."""

from __future__ import annotations

import logging
import math
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparse_ds.distributed.process_group import world_size
from sparse_ds.distributed.zero3_partitions import all_reduce_max_

logger = logging.getLogger("sparse_ds")


class EarlyStopping(TrainerCallback):
    """After `patience` evaluations in a row without a new lowest held-out loss the training ends.

    The evaluation before the first step counts as the first loss. A loss that is not finite is no new lowest one.

    Collectives: one all-reduce of 4 bytes after every evaluation; on every rank. All ranks have the same loss, but one
    rank that went on alone would wait for ever.

    Args:
        patience: evaluations.
        device: of the process group.
    """

    def __init__(self, patience: int, device: torch.device) -> None:
        self._patience, self._device = patience, device
        self.lowest_loss: float = math.inf
        self.num_without_gain = 0
        """Evaluations since the one with the lowest loss."""

    def saved_state(self) -> dict[str, Any]:
        """For a checkpoint, in plain JSON types: a lowest loss that is not finite becomes None."""
        lowest = self.lowest_loss if math.isfinite(self.lowest_loss) else None
        return {"lowest_loss": lowest, "num_without_gain": self.num_without_gain}

    def restore_state(self, state: dict[str, Any]) -> None:
        """Take over what `saved_state` returned."""
        self.lowest_loss = math.inf if state["lowest_loss"] is None else float(state["lowest_loss"])
        self.num_without_gain = int(state["num_without_gain"])

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        loss = (metrics or {})["eval_loss"]
        if loss < self.lowest_loss:
            self.lowest_loss, self.num_without_gain = loss, 0
        else:
            self.num_without_gain += 1
        wanted = torch.tensor([float(self.num_without_gain >= self._patience)])
        if world_size() > 1:
            all_reduce_max_(wanted, self._device)
        if bool(wanted) and not control.should_training_stop:
            logger.info(
                "the held-out loss has not fallen below %.4f in %d evaluations: the training ends after step %d",
                self.lowest_loss,
                self.num_without_gain,
                state.global_step,
            )
            control.should_training_stop = True
