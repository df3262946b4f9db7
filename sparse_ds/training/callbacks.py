"""What happens at the edges of a step: SM3's maxima merged, events, metrics, the progress bar.

Order within one optimizer step (Trainer calls the callbacks in this order, on every rank):

    on_step_begin                    RunEvents: the layers show their gradients in an estimation phase
    engine.backward + engine.step    inside Trainer's training_step of the last micro batch
    on_optimizer_step                MergeAccumulators: one all-reduce MAX; RunEvents: sums of the estimation phase
    on_step_end                      RunEvents: drop-and-grow, then release of gathered parameters
    on_log                           WriteMetrics
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparse_ds.distributed.gradient_tiles import clip_coefficient
from sparse_ds.distributed.watchdog import Watchdog
from sparse_ds.distributed.zero3_partitions import all_reduce_max_
from sparse_ds.drop_grow.estimation import EstimationPhase
from sparse_ds.drop_grow.event import DropAndGrow, EventRecord, Seeds
from sparse_ds.model.flops import StepFlops
from sparse_ds.monitor.memory import memory_gib
from sparse_ds.monitor.metrics_log import MetricsLog
from sparse_ds.monitor.throughput import Throughput, throughput
from sparse_ds.optim.sm3 import SparseSM3
from sparse_ds.optim.sparse_adamw import SparseAdamW
from sparse_ds.training.classification_scores import SCORES
from sparse_ds.training.global_order import GlobalOrderSampler

if TYPE_CHECKING:
    from sparse_ds.training.setup import EventSchedule
    from sparse_ds.training.trainer import SparseTrainer


class OnTrainBegin(TrainerCallback):
    """Calls `action(total_steps)` once the engine exists, before the first step, on every rank."""

    def __init__(self, action: Callable[[int], None]) -> None:
        self._action = action

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._action(state.max_steps)


class NotePosition(TrainerCallback):
    """Tells the watchdog where the run is."""

    def __init__(self, watchdog: Watchdog) -> None:
        self._watchdog = watchdog

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._watchdog.note(f"step {state.global_step + 1}", is_training=True)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._watchdog.note("the end of the run", is_training=False)


class EpochOrder(TrainerCallback):
    """Gives every epoch its own permutation of the samples (Trainer reaches no sampler inside accelerate's shards)."""

    def __init__(self, sampler: GlobalOrderSampler) -> None:
        self._sampler = sampler

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._sampler.set_epoch(math.floor(state.epoch or 0.0))


class MergeAccumulators(TrainerCallback):
    """After every optimizer step: SM3's row and column maxima become those over all ranks.

    Collectives: one all-reduce MAX of [rows] + [cols] of all tensors, fp32; on every rank.
    """

    def __init__(self, optimizer: SparseSM3, device: torch.device) -> None:
        self._optimizer, self._device = optimizer, device

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        all_reduce_max_(self._optimizer.pending_accumulators, self._device)
        self._optimizer.finish_step()


class RunEvents(TrainerCallback):
    """Estimation phases, and after the steps of the schedule one drop-and-grow event.

    Args:
        schedule: when.
        estimation: measures during the phases; None for a method that does not look at the dense gradient.
        drop_and_grow: runs an event.
        optimizer: paused where nothing trains; asked for the ages that grown weights begin with.
        engine: DeepSpeed's.
        release: gives back gathered parameters.
        log: takes each event's record.
    """

    def __init__(
        self,
        schedule: EventSchedule,
        estimation: EstimationPhase | None,
        drop_and_grow: DropAndGrow,
        optimizer: SparseSM3 | SparseAdamW,
        engine: Any,
        release: Callable[[], None],
        log: Callable[[EventRecord], None],
    ) -> None:
        self._schedule, self._estimation, self._drop_and_grow = schedule, estimation, drop_and_grow
        self._optimizer, self._engine, self._release, self._log = optimizer, engine, release, log
        self._is_estimation = False

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        step = state.global_step + 1
        if isinstance(self._optimizer, SparseAdamW):
            self._optimizer.paused = self._schedule.is_paused(step)
        self._is_estimation = self._estimation is not None and self._schedule.is_estimation(step)
        if self._estimation is not None and self._is_estimation:
            self._estimation.begin_step()

    def on_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._estimation is not None and self._is_estimation:
            self._estimation.end_step(clip_coefficient(self._engine))

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        step = state.global_step
        if not self._schedule.is_event(step):
            return
        record = self._drop_and_grow.run(step, self._schedule.num_to_replace(step), self._seeds(step))
        self._release()
        self._log(record)

    def _seeds(self, step: int) -> Seeds:
        if not isinstance(self._optimizer, SparseAdamW):
            return Seeds(None, step)
        num_applied = self._optimizer.num_applied_steps
        if self._schedule.is_paused(step) or self._estimation is None:
            return Seeds(None, num_applied)
        betas: tuple[float, float] = self._optimizer.param_groups[0]["betas"]
        return Seeds(betas, num_applied - self._estimation.num_counted_steps)


class WriteMetrics(TrainerCallback):
    """Step and evaluation lines of metrics.jsonl.

    Args:
        trainer: counts tokens and pairs.
        log: takes the lines.
        flops: what they cost.
        peak_tflops: of one device; None: not known.

    Collectives: one small all-reduce per logged step (tokens of all ranks); on every rank.
    """

    def __init__(self, trainer: SparseTrainer, log: MetricsLog, flops: StepFlops, peak_tflops: float | None) -> None:
        self._trainer, self._log = trainer, log
        self._flops, self._peak_tflops = flops, peak_tflops
        self._last_s = time.perf_counter()
        self._num_tokens = self._num_pairs = 0
        """Of all ranks so far."""
        self.train_wall_s = 0.0
        """Seconds spent in training steps and events so far; evaluation excluded."""
        self._last_heldout: tuple[int, float, dict[str, float]] | None = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._last_s = time.perf_counter()

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        self._last_s = time.perf_counter()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = logs or {}
        if "eval_loss" in logs:
            evaluated = {name.removeprefix("eval_"): value for name, value in logs.items() if name.startswith("eval_")}
            scores = {name: evaluated[name] for name in SCORES if name in evaluated}
            self._last_heldout = (state.global_step, logs["eval_loss"], scores)
            self._log.write("eval", {"step": state.global_step, **evaluated})
        elif "loss" in logs:
            now = time.perf_counter()
            elapsed_s, self._last_s = now - self._last_s, now
            num_tokens, num_pairs = self._trainer.count_work()
            self._num_tokens += num_tokens
            self._num_pairs += num_pairs
            self.train_wall_s += elapsed_s
            record: dict[str, Any] = {
                "loss": logs["loss"],
                "grad_norm": logs.get("grad_norm"),
                "lr": logs.get("learning_rate"),
                "epoch": logs.get("epoch"),
                "num_tokens": num_tokens,
                **self._throughput(num_tokens, num_pairs, elapsed_s).to_record(),
                **memory_gib(args.device),
            }
            self._log.write("step", {"step": state.global_step, **record})

    def of_run(self) -> Throughput:
        """Of all training steps and events so far."""
        return self._throughput(self._num_tokens, self._num_pairs, self.train_wall_s)

    def _throughput(self, num_tokens: int, num_pairs: int, wall_s: float) -> Throughput:
        is_recomputed = self._trainer.model.is_activation_checkpointing
        return throughput(
            num_tokens=num_tokens,
            model_flops=self._flops.of(num_tokens, num_pairs),
            recomputed_flops=self._flops.recomputed(num_tokens, num_pairs) if is_recomputed else 0.0,
            wall_s=wall_s,
            num_ranks=self._trainer.args.world_size,
            peak_tflops=self._peak_tflops,
        )

    def heldout_at(self, step: int) -> tuple[float, dict[str, float]] | None:
        """(held-out loss, scores of a classification) if they were last measured after `step`."""
        return self._last_heldout[1:] if self._last_heldout is not None and self._last_heldout[0] == step else None

    def saved_state(self) -> dict[str, Any]:
        """For a checkpoint: what a resumed run goes on counting from."""
        last = None if self._last_heldout is None else list(self._last_heldout)
        return {
            "num_tokens": self._num_tokens,
            "num_pairs": self._num_pairs,
            "train_wall_s": self.train_wall_s,
            "last_heldout": last,
        }

    def restore_state(self, state: dict[str, Any]) -> None:
        """Take over what `saved_state` returned."""
        self._num_tokens, self.train_wall_s = int(state["num_tokens"]), float(state["train_wall_s"])
        # A checkpoint of a time before pairs were counted has none.
        self._num_pairs = int(state.get("num_pairs", 0))
        if state["last_heldout"] is not None:
            step, loss, scores = state["last_heldout"]
            self._last_heldout = int(step), float(loss), {name: float(scores[name]) for name in scores}


class ProgressBar(ProgressCallback):
    """Trainer's progress bar with ETA, the loss beside it, and no line per logged step."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        if state.is_world_process_zero and self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix(loss=f"{logs['loss']:.4f}", refresh=False)
