"""What a run says about itself: the lines at its start, each event, and what it gained, before against after.

start of the run     `log_load`, `say_start`
before training      `RunReport.measure_before`      held-out loss, tasks, a sample answer
every event          `note_event`
every checkpoint     `to_state`; a resumed run goes on with `restore`, so that it reports the whole run
end of training      `summarize`                     the same measured again
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch

from sparse_ds.adapter.adapter import AdapterConfig
from sparse_ds.adapter.of_checkpoint import REPORT_KEY
from sparse_ds.config import RunConfig, UserError
from sparse_ds.config.schema import BatchPlan
from sparse_ds.data import SamplePrompt
from sparse_ds.data.packing import PackedDataset
from sparse_ds.distributed import process_group
from sparse_ds.distributed.zero3_partitions import all_reduce_max_
from sparse_ds.drop_grow.event import EventRecord
from sparse_ds.monitor.memory import memory_gib
from sparse_ds.monitor.metrics_log import MetricsLog
from sparse_ds.monitor.summary import RunSummary
from sparse_ds.training.callbacks import WriteMetrics
from sparse_ds.training.evaluation import sample_answer
from sparse_ds.training.setup import PreparedModel
from sparse_ds.training.task_scoring import ScoreTasks
from sparse_ds.training.trainer import SparseTrainer
from sparse_ds.training.training_rows import TrainingRows

logger = logging.getLogger("sparse_ds")


def log_load(log: MetricsLog, prepared: PreparedModel, checkpoint_bytes: int, device: torch.device) -> None:
    """The `load` line. Collectives: one gather of a small record."""
    loaded = prepared.loaded
    ranks = process_group.gather({"wall_s": loaded.wall_s, "bytes_read": loaded.bytes_read, **memory_gib(device)})
    log.write(
        "load",
        {
            "step": 0,
            "tensors": loaded.num_tensors,
            "bytes": checkpoint_bytes,
            "ranks": [{"rank": index, **record} for index, record in enumerate(ranks)],
        },
    )
    logger.info(
        "base model loaded in %.1f s: %.2f GiB of %.2f GiB read by rank 0, peak memory %.2f GiB",
        loaded.wall_s,
        loaded.bytes_read / 2**30,
        checkpoint_bytes / 2**30,
        max(record["peak_memory_gib"] for record in ranks),
    )


def say_start(config: RunConfig, prepared: PreparedModel, rows: TrainingRows, plan: BatchPlan, world_size: int) -> None:
    """What trains, over which base, and in which batches."""
    unit = "samples"
    if isinstance(rows.dataset, PackedDataset):
        unit = "packed rows"
        logger.info("data.packing: %s", rows.dataset.describe())
    logger.info(
        "%s on %s: %s of %s weights train (%.2f %%), base %s %s; %d rank(s) x %d %s x %d micro batch(es) = %d "
        "%s a step",
        config.method.name,
        config.model.name_or_path,
        f"{prepared.num_trained_weights:,}",
        f"{prepared.num_weights:,}",
        100 * prepared.num_trained_weights / prepared.num_weights,
        config.model.quantization if prepared.layers else "none",
        config.model.dtype,
        world_size,
        plan.micro_batch_size,
        unit,
        plan.gradient_accumulation_steps,
        plan.global_batch_size,
        unit,
    )


class RunReport:
    """What the summary of a run needs, gathered while it runs. Every rank has one, and all call its methods together.

    Args:
        config: the run.
        prepared: its model.
        trainer: its Trainer.
        metrics: counts tokens and seconds, and remembers the last evaluation.
        tasks: asks the questions of `data.tasks`; None without any.
        log: takes the events.
        tokenizer: of the model.
        prompt: what is answered before and after; None: nothing.
        adapter_config: what the adapter says of itself, on rank 0; None on the others.
        device: of the rank.
    """

    def __init__(
        self,
        config: RunConfig,
        prepared: PreparedModel,
        trainer: SparseTrainer,
        metrics: WriteMetrics,
        tasks: ScoreTasks | None,
        log: MetricsLog,
        tokenizer: Any,
        prompt: SamplePrompt | None,
        adapter_config: AdapterConfig | None,
        device: torch.device,
    ) -> None:
        self._config, self._prepared, self._trainer, self._metrics = config, prepared, trainer, metrics
        self._tasks, self._log, self._tokenizer, self._prompt = tasks, log, tokenizer, prompt
        self._device = device
        self.adapter_config = adapter_config
        self.index_hash: str | None = None
        """Of the last event."""
        self._heldout_before: float | None = None
        self._scores_before: dict[str, float] = {}
        self._tasks_before: dict[str, float] | None = None
        self._answer_before: str | None = None

    def measure_before(self, *, has_heldout: bool) -> None:
        """Everything that is compared at the end. Collectives: those of evaluation; every rank must call it."""
        if has_heldout:
            before = self._trainer.evaluate()
            self._heldout_before = before["eval_loss"]
            self._scores_before = (self._metrics.heldout_at(0) or (None, {}))[1]
        self._tasks_before = self._task_accuracies()
        self._answer_before = self._answer()

    def to_state(self) -> dict[str, Any]:
        """What a resumed run needs to report the whole run, in plain JSON types."""
        return {
            "heldout_before": self._heldout_before,
            "scores_before": self._scores_before,
            "answer_before": self._answer_before,
            "index_hash": self.index_hash,
            "tasks_before": self._tasks_before,
            REPORT_KEY: None if self.adapter_config is None else self.adapter_config.model_dump(mode="json"),
        }

    def restore(self, state: dict[str, Any], folder: Path) -> None:
        """Take over what `to_state` returned. Collectives: none.

        Args:
            state: from a checkpoint.
            folder: that checkpoint, for messages.

        Raises:
            UserError: something is missing.
        """
        try:
            self._heldout_before, self._scores_before = state["heldout_before"], state["scores_before"]
            self.index_hash = state["index_hash"]
            self._tasks_before = state.get("tasks_before")
            self._note_births(_births(state.get(REPORT_KEY)))
            self._answer_before = state["answer_before"]
        except KeyError as error:
            raise UserError(f"checkpoint {folder}: `run_state.report` has no {error}.") from error

    def note_event(self, record: EventRecord) -> None:
        """The `event` line, and what the adapter says of the ages of its weights."""
        self.index_hash = record.index_hash
        self._note_births(record.birth_steps)
        self._log.write(
            "event",
            {
                "step": record.step,
                "dropped": record.num_dropped,
                "grown": record.num_grown,
                "active": record.num_active,
                "index_hash": record.index_hash,
                "wall_s": record.wall_s,
                "birth_steps": {str(birth): count for birth, count in record.birth_steps.items()},
                "tensors": {
                    name: {
                        "replaced": tensor.num_replaced,
                        "active": tensor.num_active,
                        "rows": tensor.num_rows,
                        "cols": tensor.num_cols,
                    }
                    for name, tensor in record.tensors.items()
                },
            },
        )

    def summarize(self, *, has_heldout: bool, adapter_dir: Path | None, num_skipped_steps: int) -> RunSummary:
        """The run as a whole; what was not just measured is measured now.

        Collectives: those of evaluation, and one all-reduce; every rank must call it.
        """
        step = self._trainer.state.global_step
        heldout_after: float | None = None
        scores_after: dict[str, float] = {}
        if has_heldout:
            if self._metrics.heldout_at(step) is None:
                self._trainer.evaluate()
            heldout_after, scores_after = self._metrics.heldout_at(step) or (None, {})
        tasks_after = self._task_accuracies()
        answer_after = self._answer()
        speed = self._metrics.of_run()
        peak = torch.tensor([memory_gib(self._device)["peak_memory_gib"]], dtype=torch.float64)
        all_reduce_max_(peak, self._device)
        return RunSummary(
            heldout_loss_before=self._heldout_before,
            heldout_loss_after=heldout_after,
            num_trained_weights=self._prepared.num_trained_weights,
            num_weights=self._prepared.num_weights,
            num_steps=step,
            wall_s=self._metrics.train_wall_s,
            tokens_per_second=speed.tokens_per_second,
            peak_memory_gib=float(peak),
            index_hash=self.index_hash,
            sample_prompt=self._prompt.text if self._prompt else None,
            sample_answer_before=self._answer_before,
            sample_answer_after=answer_after,
            reference_answer=self._prompt.reference if self._prompt else None,
            adapter_dir=None if adapter_dir is None else str(adapter_dir),
            merged_dir=None,
            heldout_scores_before=self._scores_before or None,
            heldout_scores_after=scores_after or None,
            num_skipped_steps=num_skipped_steps,
            tflops_per_rank=speed.tflops_per_rank,
            mfu=speed.mfu,
            hfu=speed.hfu,
            tasks=None if self._tasks is None else self._tasks.summary(self._tasks_before, tasks_after or {}),
        )

    def _note_births(self, birth_steps: dict[int, int] | None) -> None:
        if self.adapter_config is not None:
            self.adapter_config = self.adapter_config.model_copy(update={"birth_steps": birth_steps})

    def _task_accuracies(self) -> dict[str, float] | None:
        """Task -> accuracy of the model as it is now; None without tasks."""
        if self._tasks is None:
            return None
        step = self._trainer.state.global_step
        if self._tasks.accuracies_at(step) is None:
            self._tasks.score(step)
        return self._tasks.accuracies_at(step)

    def _answer(self) -> str | None:
        """To the prompt, by the model as it is now."""
        if self._prompt is None:
            return None
        num_tokens = self._config.monitor.sample_max_tokens
        answer = sample_answer(self._trainer.model, self._tokenizer, self._prompt.input_ids, num_tokens, self._device)
        self._trainer.release_gathered()
        return answer


def _births(adapter: dict[str, Any] | None) -> dict[int, int] | None:
    """Of the adapter that a checkpoint describes; JSON has made text of the steps."""
    births = (adapter or {}).get("birth_steps")
    return None if births is None else {int(step): count for step, count in births.items()}
