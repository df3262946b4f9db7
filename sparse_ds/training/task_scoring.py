"""The questions of `data.tasks`, asked whenever a run evaluates: before, in between and after."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparse_ds.evaluation.grading import TaskScore
from sparse_ds.evaluation.scoring import TaskScorer
from sparse_ds.monitor.metrics_log import MetricsLog

if TYPE_CHECKING:
    from sparse_ds.training.trainer import SparseTrainer

logger = logging.getLogger("sparse_ds")


class ScoreTasks(TrainerCallback):
    """After every evaluation: a `task` line of metrics.jsonl per task, and the same for the trackers.

    Args:
        scorers: the tasks, encoded.
        trainer: gives the Trainer, which is made later than its callbacks.
        log: takes the lines.
        batch_size: texts of one forward pass on one rank.
        device: of the model.

    Collectives: those of `TaskScorer.score`; on every rank.
    """

    def __init__(
        self,
        scorers: list[TaskScorer],
        trainer: Callable[[], SparseTrainer],
        log: MetricsLog,
        batch_size: int,
        device: torch.device,
    ) -> None:
        self._scorers, self._trainer, self._log = scorers, trainer, log
        self._batch_size, self._device = batch_size, device
        self._last: tuple[int, list[TaskScore]] | None = None

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.score(state.global_step)

    def score(self, step: int) -> None:
        """Ask all tasks now."""
        trainer, scores = self._trainer(), []
        for scorer in self._scorers:
            score = scorer.score(trainer.model, self._batch_size, self._device)
            scores.append(score)
            self._log.write("task", {"step": step, **score.to_record()})
            trainer.log({f"task_{score.task}_{name}": value for name, value in score.metrics.items()})
            logger.info("task %s: accuracy %.2f %% of %d", score.task, 100 * score.accuracy, score.num_samples)
        trainer.release_gathered()
        self._last = step, scores

    def accuracies_at(self, step: int) -> dict[str, float] | None:
        """Task -> accuracy, if they were last asked after `step`."""
        if self._last is None or self._last[0] != step:
            return None
        return {score.task: score.accuracy for score in self._last[1]}

    def summary(self, before: dict[str, float] | None, after: dict[str, float]) -> list[dict[str, Any]]:
        """What the report says: a record per task; None where a task was not asked."""
        assert self._last is not None
        return [
            {
                "task": score.task,
                "num_samples": score.num_samples,
                "accuracy_before": (before or {}).get(score.task),
                "accuracy_after": after[score.task],
                "chance": score.chance,
            }
            for score in self._last[1]
        ]
