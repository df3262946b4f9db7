"""One run, from its configuration to the files it leaves.

check     output folder, base model                  before the process group exists
build     data, model born partitioned, Trainer      ranks agree on success after each
train     held-out loss and sample answers before and after
save      adapter/: gathered tensor by tensor, written by rank 0
leave     the process group ends, all ranks together
export    merged/ and adapters for PEFT by rank 0 alone: nobody waits in a collective while files are written
"""

from __future__ import annotations

import logging
import math
import os
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PrinterCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from sparse_ds.adapter.adapter import AdapterConfig
from sparse_ds.adapter.of_checkpoint import REPORT_KEY
from sparse_ds.checkpoint.identity import check_identity
from sparse_ds.checkpoint.reading import Checkpoint
from sparse_ds.checkpoint.run_folder import find_checkpoint, remove_checkpoints_after
from sparse_ds.config import RunConfig, UserError
from sparse_ds.config.errors import STOPPED_EXIT_CODE, RunStoppedError
from sparse_ds.config.methods import all_methods
from sparse_ds.data import DataBundle, SamplePrompt
from sparse_ds.data.fingerprint import dataset_fingerprint
from sparse_ds.data.named_templates import exported_template
from sparse_ds.data.packing import PackedDataset
from sparse_ds.distributed import process_group
from sparse_ds.distributed.launch_environment import LaunchEnvironment
from sparse_ds.distributed.watchdog import Watchdog
from sparse_ds.distributed.zero3_partitions import MasterWeights, all_reduce_max_, full_size
from sparse_ds.drop_grow.estimation import EstimationPhase
from sparse_ds.drop_grow.event import EventRecord
from sparse_ds.drop_grow.weight_states import WeightStates
from sparse_ds.evaluation.questions import read_tasks
from sparse_ds.evaluation.scoring import TaskScorer, longest_input
from sparse_ds.export.tokenizer_folder import write_tokenizer
from sparse_ds.model.base_checkpoint import BaseCheckpoint
from sparse_ds.model.build import read_architecture
from sparse_ds.model.classification_head import Classification, find_label_word_ids
from sparse_ds.model.find_base_model import find_base_model, require_same_base
from sparse_ds.model.kinds import check_task
from sparse_ds.model.tokenizer import load_tokenizer
from sparse_ds.monitor.memory import memory_gib
from sparse_ds.monitor.metrics_log import MetricsLog, drop_records_after
from sparse_ds.monitor.summary import RunSummary
from sparse_ds.optim.sm3 import SparseSM3
from sparse_ds.optim.sparse_adamw import SparseAdamW
from sparse_ds.training.base_guard import BaseGuard
from sparse_ds.training.callbacks import (
    EpochOrder,
    MergeAccumulators,
    NotePosition,
    OnTrainBegin,
    ProgressBar,
    RunEvents,
    WriteMetrics,
)
from sparse_ds.training.checkpointing import PublishCheckpoints, RunCheckpoints
from sparse_ds.training.early_stopping import EarlyStopping
from sparse_ds.training.engine_state import EngineState
from sparse_ds.training.evaluation import sample_answer
from sparse_ds.training.exporting import export_and_report
from sparse_ds.training.global_order import GlobalOrderSampler
from sparse_ds.training.output_folder import OutputFolder
from sparse_ds.training.run_data import read_run_data
from sparse_ds.training.run_identity import check_same_run, run_identity
from sparse_ds.training.saving import describe_adapter, save_deltas, save_dense_model
from sparse_ds.training.setup import (
    EventSchedule,
    PreparedModel,
    bind_optimizer,
    make_drop_and_grow,
    make_estimation,
    make_optimizer,
    make_training_arguments,
    prepare_model,
)
from sparse_ds.training.skipped_steps import SkippedSteps, samples_of_step
from sparse_ds.training.stop_signals import StopSignals, StopTogether
from sparse_ds.training.task_scoring import ScoreTasks
from sparse_ds.training.trainer import SparseTrainer, classification_loss
from sparse_ds.training.trainer_progress import TrainerProgress, check_trainer_state
from sparse_ds.training.training_rows import order_rows

logger = logging.getLogger("sparse_ds")


def run(config: RunConfig, launch: LaunchEnvironment, device_type: str) -> None:
    """Carry out one run. Every rank calls it; all return or raise together.

    Args:
        config: the run.
        launch: this process's place.
        device_type: "cpu" or "cuda".

    Raises:
        UserError: anything wrong with what the user gave, before training starts.
        RunStoppedError: the run was asked to stop, or cannot go on; all ranks raise it together.
    """
    output = OutputFolder(config.train.output_dir)
    output.check(overwrite=config.train.overwrite, resume=config.checkpoint.resume)
    base_folder = find_base_model(config.model.name_or_path, config.model.revision)
    transformers.utils.logging.set_verbosity_error()
    process_group.start(device_type, config.train.stall_timeout_s)
    device = torch.device("cuda", launch.local_rank) if device_type == "cuda" else torch.device("cpu")
    if device_type == "cpu":
        _share_cores(config)
    watchdog = Watchdog(launch.rank, launch.world_size, config.train.stall_timeout_s)
    watchdog.start()
    process_group.before_leaving(watchdog.stop)
    with StopSignals(launch.rank, launch.launcher) as signals:
        try:
            summary = _Training(config, launch, output, base_folder, device, watchdog, signals).carry_out()
        except (UserError, RunStoppedError):
            # All ranks raise it together, and leave together.
            raise
        except Exception as error:
            watchdog.fail(error)
            raise
        process_group.stop()
    # Trainer left a global mark that makes transformers build every later model under ZeRO-3.
    unset_hf_deepspeed_config()
    if launch.rank == 0:
        export_and_report(config, output, base_folder, summary, device)


def _share_cores(config: RunConfig) -> None:
    """One thread count whatever the launcher set: it decides the order of CPU sums, so it must not depend on it."""
    local_ranks = int(os.environ["LOCAL_WORLD_SIZE"])
    num_threads = config.train.cpu_threads or max(1, len(os.sched_getaffinity(0)) // local_ranks)
    torch.set_num_threads(num_threads)
    # accelerate sets torch's count from this variable, and to 1 without it.
    os.environ["OMP_NUM_THREADS"] = str(num_threads)


@dataclass(frozen=True)
class _Answers:
    prompt: SamplePrompt | None = None
    before: str | None = None
    after: str | None = None


class _Training:
    """The part of a run inside the process group."""

    def __init__(
        self,
        config: RunConfig,
        launch: LaunchEnvironment,
        output: OutputFolder,
        base_folder: Path,
        device: torch.device,
        watchdog: Watchdog,
        signals: StopSignals,
    ) -> None:
        self.config, self.launch, self.output = config, launch, output
        self.base_folder, self.device = base_folder, device
        self.watchdog = watchdog
        self.stop = StopTogether(signals, device)
        patience = config.train.early_stopping_patience
        self.early_stopping = None if patience is None else EarlyStopping(patience, device)
        self.is_main = launch.rank == 0
        self.index_hash: str | None = None
        self.adapter_config: AdapterConfig | None = None
        self.answers = _Answers()
        self.heldout_before: float | None = None
        self.scores_before: dict[str, float] = {}
        self.tasks: ScoreTasks | None = None
        self.tasks_before: dict[str, float] | None = None
        self.resumed: Checkpoint | None = None
        self.weight_states: WeightStates | None = None
        self.estimation: EstimationPhase | None = None

    def carry_out(self) -> RunSummary:
        config = self.config
        with process_group.agreement("reading the data", is_long=True):
            plan = config.batch_plan(self.launch.world_size)
            checkpoint = BaseCheckpoint(self.base_folder)
            check_task(checkpoint.config, checkpoint.folder, config.model.task)
            architecture = read_architecture(checkpoint)
            fingerprint = checkpoint.fingerprint()
            self.tokenizer = load_tokenizer(self.base_folder)
            self.data: DataBundle = read_run_data(
                config,
                architecture,
                self.tokenizer,
                global_batch_size=plan.global_batch_size,
                num_sample_prompts=config.monitor.num_sample_prompts,
                show_progress=self.is_main,
                show_bar=self.launch.rank == self.launch.local_rank,
            )
            self.rows = order_rows(config, self.data, plan.global_batch_size)
            sampler = self.rows.sampler
            classification = self._plan_classification()
            tasks = read_tasks(config.data.tasks, "data.tasks")
            self.scorers = [TaskScorer(task, self.tokenizer, longest_input(architecture)) for task in tasks]
        require_same_base(self.base_folder, fingerprint)
        self.prepared: PreparedModel = prepare_model(
            config,
            checkpoint,
            self.device,
            classification,
            show_progress=self.is_main and config.monitor.progress_bar,
        )
        self.identity = run_identity(config, checkpoint, self.prepared, self.rows.fingerprint(), plan.global_batch_size)
        heldout = None if self.data.eval is None else dataset_fingerprint(self.data.eval)
        digests = {f"task {task.name}": task.digest() for task in tasks}
        check_same_run({**self.identity, "held-out data": heldout, **digests})
        self.steps_per_epoch = len(sampler) // plan.global_batch_size
        self.resumed = self._find_resumed()
        with process_group.agreement("making the output folder"):
            if self.is_main:
                self.adapter_config = describe_adapter(config, self.prepared, checkpoint)
                self.output.create(config.to_dict(), resume=config.checkpoint.resume)
                if (chat_template := exported_template(self.tokenizer, config.data.template)) is not None:
                    write_tokenizer(self.base_folder, self.output.tokenizer, chat_template)
                if config.checkpoint.resume is not None:
                    # In a folder of its own there is nothing of the kind. Without a checkpoint all is written again.
                    step = -1 if self.resumed is None else self.resumed.index.step
                    drop_records_after(self.output.metrics, step)
                    remove_checkpoints_after(self.output.path, step)
        self.log = MetricsLog(self.output.metrics, enabled=self.is_main)
        self._log_load(checkpoint)
        self.trainer = self._make_trainer(sampler)
        self._say_start(plan)
        self.trainer.train(resume_from_checkpoint=None if self.resumed is None else str(self.resumed.folder))
        self.checkpoints.finish()
        if self.stop.is_stopping:
            self.log.close()
            raise RunStoppedError(
                f"stopped by {self.stop.reason} after step {self.trainer.state.global_step}; go on with "
                "`--resume auto`",
                STOPPED_EXIT_CODE,
            )
        summary = self._summarize()
        self._save()
        self.log.close()
        return summary

    def _plan_classification(self) -> Classification | None:
        """What the model has to know of the labels; None for a language model."""
        labels, words = self.data.train_data.labels, self.config.model.label_words
        if labels is None:
            return None
        word_ids = None if words is None else find_label_word_ids(self.tokenizer, words, labels)
        return Classification(labels, self.data.collator.pad_token_id, word_ids)

    def _log_load(self, checkpoint: BaseCheckpoint) -> None:
        """Collectives: one gather of a small record."""
        loaded = self.prepared.loaded
        ranks = process_group.gather(
            {"wall_s": loaded.wall_s, "bytes_read": loaded.bytes_read, **memory_gib(self.device)}
        )
        self.log.write(
            "load",
            {
                "step": 0,
                "tensors": loaded.num_tensors,
                "bytes": checkpoint.size_bytes,
                "ranks": [{"rank": index, **record} for index, record in enumerate(ranks)],
            },
        )
        logger.info(
            "base model loaded in %.1f s: %.2f GiB of %.2f GiB read by rank 0, peak memory %.2f GiB",
            loaded.wall_s,
            loaded.bytes_read / 2**30,
            checkpoint.size_bytes / 2**30,
            max(record["peak_memory_gib"] for record in ranks),
        )

    def _make_trainer(self, sampler: GlobalOrderSampler) -> SparseTrainer:
        config = self.config
        trained = [p for p in self.prepared.model.parameters() if p.requires_grad]
        arguments = make_training_arguments(
            config,
            self.launch.world_size,
            max(full_size(p) for p in trained),
            self.output.path,
            self.device,
            self.prepared.gathered_block,
        )
        if self.scorers:
            self.tasks = ScoreTasks(
                self.scorers, lambda: self.trainer, self.log, arguments.per_device_eval_batch_size, self.device
            )
        trainer = SparseTrainer(
            make_optimizer=lambda parameters: make_optimizer(config, parameters),
            sampler=sampler,
            heldout=self.data.eval,
            collate_heldout=self.data.collator,
            on_save=self._save_checkpoint,
            on_restore_generators=lambda: self.progress.restore_generators(),
            model=self.prepared.model,
            args=arguments,
            data_collator=self.rows.collate,
            train_dataset=self.rows.dataset,
            eval_dataset=self.data.eval,
            callbacks=[
                EpochOrder(sampler),
                NotePosition(self.watchdog),
                BaseGuard(self.prepared.frozen_parameters),
                OnTrainBegin(self._bind),
                # Before WriteMetrics, which counts no time of evaluation as training.
                *([] if self.tasks is None else [self.tasks]),
            ],
            compute_loss_func=None if self.prepared.classification is None else classification_loss,
        )
        trainer.remove_callback(PrinterCallback)
        self.metrics = WriteMetrics(trainer, self.log)
        trainer.add_callback(self.metrics)
        self.skipped = SkippedSteps(
            trainer,
            self.log,
            self._rows_of_step,
            config.train.max_skipped_steps,
        )
        for each in (self.skipped, self.stop, self.early_stopping):
            if each is not None:
                trainer.add_callback(each)
        if config.monitor.progress_bar:
            trainer.add_callback(ProgressBar())
        return trainer

    def _bind(self, total_steps: int) -> None:
        """Once the engine exists: the optimizer learns what lies where, events are set up, the start is measured."""
        master = MasterWeights(self.trainer.deepspeed)
        master.zero_padding()
        self.master = master
        optimizer = self.trainer.deepspeed.optimizer.optimizer
        if isinstance(optimizer, SparseSM3 | SparseAdamW):
            self._bind_sparse(optimizer, total_steps)
        engine = EngineState(
            self.prepared.layers,
            self.prepared.dense_parameters,
            master,
            optimizer,
            self.weight_states,
            self.estimation,
        )
        self.progress = TrainerProgress(self.trainer, self.config.train.seed, self.steps_per_epoch)
        self.checkpoints = RunCheckpoints(
            self.config.checkpoint, self.identity, self.output.path, engine, self.progress
        )
        if self.config.checkpoint.background:
            self.trainer.add_callback(PublishCheckpoints(self.checkpoints))
        prompt = self.data.sample_prompts[0] if self.data.sample_prompts else None
        if self.resumed is not None:
            self._go_on(self.resumed, prompt)
            return
        if self.data.eval is not None:
            before = self.trainer.evaluate()
            self.heldout_before = before["eval_loss"]
            self.scores_before = (self.metrics.heldout_at(0) or (None, {}))[1]
        self.tasks_before = self._task_accuracies()
        if prompt is not None:
            self.answers = _Answers(prompt, before=self._answer(prompt))

    def _bind_sparse(self, optimizer: SparseSM3 | SparseAdamW, total_steps: int) -> None:
        config, layers, master = self.config, self.prepared.matrices, self.master
        bind_optimizer(optimizer, self.prepared.layers, master, self.prepared.dense_parameters)
        if isinstance(optimizer, SparseSM3):
            self.trainer.add_callback(MergeAccumulators(optimizer, self.device))
        self.weight_states = WeightStates(
            optimizer, master.flats, keeps_event_values=config.method.drop_criterion == "change"
        )
        if all_methods()[config.method.name].events == "none":
            return
        self.estimation = make_estimation(config, layers, self.device)
        drop_and_grow = make_drop_and_grow(
            config, optimizer, layers, master, self.weight_states, self.estimation, self.device
        )
        schedule = EventSchedule(config, layers, total_steps)
        events = RunEvents(
            schedule,
            self.estimation,
            drop_and_grow,
            optimizer,
            self.trainer.deepspeed,
            self.trainer.release_gathered,
            self._log_event,
        )
        self.trainer.add_callback(events)

    def _find_resumed(self) -> Checkpoint | None:
        """The checkpoint to go on from, checked on every rank; None for a run from the start."""
        wanted, train = self.config.checkpoint.resume, self.config.train
        if wanted is None:
            return None
        total_steps = math.ceil(train.num_epochs * self.steps_per_epoch) if train.max_steps is None else train.max_steps
        checkpoint = find_checkpoint(self.output.path, wanted)
        with process_group.agreement("reading the checkpoint"):
            if checkpoint is None:
                self.output.check_unfinished()
                logger.info("no checkpoint in %s yet: the run begins from its first step", self.output.path)
                return None
            check_identity(checkpoint.index.identity, self.identity, checkpoint.folder)
            check_trainer_state(checkpoint)
            if checkpoint.index.step > total_steps:
                raise UserError(
                    f"checkpoint.resume: {checkpoint.folder} is of step {checkpoint.index.step} and the run has "
                    f"{total_steps} steps. Raise train.max_steps (or train.num_epochs), or start anew with "
                    "`--set train.overwrite=true`."
                )
        logger.info("going on from %s (step %d)", checkpoint.folder, checkpoint.index.step)
        return checkpoint

    def _go_on(self, checkpoint: Checkpoint, prompt: SamplePrompt | None) -> None:
        report = self.checkpoints.restore(checkpoint)
        self.trainer.release_gathered()
        with process_group.agreement("restoring the report"):
            try:
                self.heldout_before, self.scores_before = report["heldout_before"], report["scores_before"]
                self.index_hash = report["index_hash"]
                self.tasks_before = report.get("tasks_before")
                self._note_births(_births(report.get(REPORT_KEY)))
                self.answers = _Answers(prompt, before=report["answer_before"])
            except KeyError as error:
                raise UserError(f"checkpoint {checkpoint.folder}: `run_state.report` has no {error}.") from error
        if self.stop.evaluation_due and self.data.eval is not None:
            self.stop.evaluation_due = False
            self.trainer.evaluate()

    def _rows_of_step(self, step: int) -> list[int | str]:
        """Rows of `data.train` of which a step of the current epoch is made: counted from 0, or as text where a number
        does not say which (mixtures, streams)."""
        size = self.config.batch_plan(self.launch.world_size).global_batch_size
        return self.rows.source_rows(samples_of_step(self.rows.sampler, size, step))

    def _save_checkpoint(self) -> None:
        heldout = self.metrics.heldout_at(self.trainer.state.global_step)
        self.checkpoints.save(self._report(), None if heldout is None else heldout[0])

    def _report(self) -> dict[str, Any]:
        """What a resumed run needs to report the whole run."""
        return {
            "heldout_before": self.heldout_before,
            "scores_before": self.scores_before,
            "answer_before": self.answers.before,
            "index_hash": self.index_hash,
            "tasks_before": self.tasks_before,
            REPORT_KEY: None if self.adapter_config is None else self.adapter_config.model_dump(mode="json"),
        }

    def _note_births(self, birth_steps: dict[int, int] | None) -> None:
        if self.adapter_config is not None:
            self.adapter_config = self.adapter_config.model_copy(update={"birth_steps": birth_steps})

    def _log_event(self, record: EventRecord) -> None:
        self.index_hash = record.index_hash
        self._note_births(record.birth_steps)
        self.log.write(
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

    def _task_accuracies(self) -> dict[str, float] | None:
        """Task -> accuracy of the model as it is now; None without tasks."""
        if self.tasks is None:
            return None
        step = self.trainer.state.global_step
        if self.tasks.accuracies_at(step) is None:
            self.tasks.score(step)
        return self.tasks.accuracies_at(step)

    def _answer(self, prompt: SamplePrompt) -> str:
        answer = sample_answer(
            self.trainer.model, self.tokenizer, prompt.input_ids, self.config.monitor.sample_max_tokens, self.device
        )
        self.trainer.release_gathered()
        return answer

    def _summarize(self) -> RunSummary:
        heldout_after: float | None = None
        scores_after: dict[str, float] = {}
        if self.data.eval is not None:
            step = self.trainer.state.global_step
            if self.metrics.heldout_at(step) is None:
                self.trainer.evaluate()
            heldout_after, scores_after = self.metrics.heldout_at(step) or (None, {})
        tasks_after = self._task_accuracies()
        for line in self.checkpoints.describe():
            logger.info("%s", line)
        if self.answers.prompt is not None:
            self.answers = replace(self.answers, after=self._answer(self.answers.prompt))
        peak = torch.tensor([memory_gib(self.device)["peak_memory_gib"]], dtype=torch.float64)
        all_reduce_max_(peak, self.device)
        prompt = self.answers.prompt
        return RunSummary(
            heldout_loss_before=self.heldout_before,
            heldout_loss_after=heldout_after,
            num_trained_weights=self.prepared.num_trained_weights,
            num_weights=self.prepared.num_weights,
            num_steps=self.trainer.state.global_step,
            wall_s=self.metrics.train_wall_s,
            tokens_per_second=self.metrics.num_tokens / max(self.metrics.train_wall_s, 1e-9),
            peak_memory_gib=float(peak),
            index_hash=self.index_hash,
            sample_prompt=prompt.text if prompt else None,
            sample_answer_before=self.answers.before,
            sample_answer_after=self.answers.after,
            reference_answer=prompt.reference if prompt else None,
            adapter_dir=str(self.output.adapter) if self.prepared.layers else None,
            merged_dir=None,
            heldout_scores_before=self.scores_before or None,
            heldout_scores_after=scores_after or None,
            num_skipped_steps=self.skipped.num_skipped,
            tasks=None if self.tasks is None else self.tasks.summary(self.tasks_before, tasks_after or {}),
        )

    def _save(self) -> None:
        if self.prepared.layers:
            stored = save_deltas(
                self.adapter_config,
                self.prepared,
                self.master,
                self.output.adapter,
                self.device,
                index_encoding=self.config.export.index_encoding,
            )
            if stored is not None and self.index_hash is not None and stored.index_hash != self.index_hash:
                raise RuntimeError(
                    f"the indices in {self.output.adapter} hash to {stored.index_hash}, but the last event left "
                    f"{self.index_hash}: this is a defect, please report it"
                )
        elif self.config.export.merged:
            save_dense_model(
                self.config,
                self.prepared,
                self.output.merged,
                self.base_folder,
                self.device,
                tokenizer_folder=self.output.tokenizer_or(self.base_folder),
            )

    def _say_start(self, plan: Any) -> None:
        if not self.is_main:
            return
        config, prepared = self.config, self.prepared
        share = prepared.num_trained_weights / prepared.num_weights
        unit = "samples"
        if isinstance(self.rows.dataset, PackedDataset):
            unit = "packed rows"
            logger.info("data.packing: %s", self.rows.dataset.describe())
        logger.info(
            "%s on %s: %s of %s weights train (%.2f %%), base %s %s; %d rank(s) x %d %s x %d micro batch(es) = %d "
            "%s a step",
            config.method.name,
            config.model.name_or_path,
            f"{prepared.num_trained_weights:,}",
            f"{prepared.num_weights:,}",
            100 * share,
            config.model.quantization if prepared.layers else "none",
            config.model.dtype,
            self.launch.world_size,
            plan.micro_batch_size,
            unit,
            plan.gradient_accumulation_steps,
            plan.global_batch_size,
            unit,
        )


def _births(adapter: dict[str, Any] | None) -> dict[int, int] | None:
    """Of the adapter that a checkpoint describes; JSON has made text of the steps."""
    births = (adapter or {}).get("birth_steps")
    return None if births is None else {int(step): count for step, count in births.items()}
