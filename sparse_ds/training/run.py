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
from pathlib import Path

import torch
import transformers
from transformers import PrinterCallback
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from sparse_ds.adapter.adapter import AdapterConfig
from sparse_ds.checkpoint.identity import check_identity
from sparse_ds.checkpoint.reading import Checkpoint
from sparse_ds.checkpoint.run_folder import find_checkpoint, remove_checkpoints_after
from sparse_ds.config import RunConfig, UserError
from sparse_ds.config.errors import STOPPED_EXIT_CODE, RunStoppedError
from sparse_ds.config.methods import all_methods
from sparse_ds.data import DataBundle
from sparse_ds.data.fingerprint import dataset_fingerprint
from sparse_ds.data.named_templates import exported_template
from sparse_ds.distributed import process_group
from sparse_ds.distributed.launch_environment import LaunchEnvironment
from sparse_ds.distributed.watchdog import Watchdog
from sparse_ds.distributed.zero3_partitions import MasterWeights, full_size
from sparse_ds.drop_grow.estimation import EstimationPhase
from sparse_ds.drop_grow.weight_states import WeightStates
from sparse_ds.evaluation.questions import read_tasks
from sparse_ds.evaluation.scoring import TaskScorer, longest_input
from sparse_ds.export.tokenizer_folder import write_tokenizer
from sparse_ds.model.base_checkpoint import BaseCheckpoint
from sparse_ds.model.build import read_architecture
from sparse_ds.model.classification_head import Classification, find_label_word_ids
from sparse_ds.model.find_base_model import find_base_model, require_same_base
from sparse_ds.model.flops import count_flops
from sparse_ds.model.kinds import check_task
from sparse_ds.model.tokenizer import load_tokenizer
from sparse_ds.monitor.metrics_log import MetricsLog, drop_records_after
from sparse_ds.monitor.summary import RunSummary
from sparse_ds.optim.sm3 import SparseSM3
from sparse_ds.optim.sparse_adamw import SparseAdamW
from sparse_ds.sparse.held_deltas import layers_that_can_hold
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
from sparse_ds.training.exporting import export_and_report
from sparse_ds.training.global_order import GlobalOrderSampler
from sparse_ds.training.output_folder import OutputFolder
from sparse_ds.training.run_data import read_run_data
from sparse_ds.training.run_identity import check_same_run, run_identity
from sparse_ds.training.run_report import RunReport, log_load, say_start
from sparse_ds.training.saving import describe_adapter, save_deltas, save_dense_model
from sparse_ds.training.setup import (
    EventSchedule,
    PreparedModel,
    bind_optimizer,
    find_peak_tflops,
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
        self.adapter_config: AdapterConfig | None = None
        self.tasks: ScoreTasks | None = None
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
        log_load(self.log, self.prepared, checkpoint.size_bytes, self.device)
        self.trainer = self._make_trainer(sampler)
        self.report = self._make_report()
        if self.is_main:
            say_start(config, self.prepared, self.rows, plan, self.launch.world_size)
        self.trainer.train(resume_from_checkpoint=None if self.resumed is None else str(self.resumed.folder))
        self.checkpoints.finish()
        if self.stop.is_stopping:
            self.log.close()
            raise RunStoppedError(
                f"stopped by {self.stop.reason} after step {self.trainer.state.global_step}; go on with "
                "`--resume auto`",
                STOPPED_EXIT_CODE,
            )
        summary = self.report.summarize(
            has_heldout=self.data.eval is not None,
            adapter_dir=self.output.adapter if self.prepared.layers else None,
            num_skipped_steps=self.skipped.num_skipped,
        )
        for line in self.checkpoints.describe():
            logger.info("%s", line)
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
        flops = count_flops(self.prepared.model)
        trainer = SparseTrainer(
            make_optimizer=lambda parameters: make_optimizer(config, parameters),
            sampler=sampler,
            heldout=self.data.eval,
            collate_heldout=self.data.collator,
            holding=layers_that_can_hold(self.prepared.layers.values(), self.device),
            count_pairs=flops.count_pairs,
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
        self.metrics = WriteMetrics(trainer, self.log, flops, find_peak_tflops(config, self.device))
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

    def _make_report(self) -> RunReport:
        prompts = self.data.sample_prompts
        return RunReport(
            self.config,
            self.prepared,
            self.trainer,
            self.metrics,
            self.tasks,
            self.log,
            self.tokenizer,
            prompts[0] if prompts else None,
            self.adapter_config,
            self.device,
        )

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
        if self.resumed is None:
            self.report.measure_before(has_heldout=self.data.eval is not None)
        else:
            self._go_on(self.resumed)

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
            self.report.note_event,
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

    def _go_on(self, checkpoint: Checkpoint) -> None:
        state = self.checkpoints.restore(checkpoint)
        self.trainer.release_gathered()
        with process_group.agreement("restoring the report"):
            self.report.restore(state, checkpoint.folder)
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
        self.checkpoints.save(self.report.to_state(), None if heldout is None else heldout[0])

    def _save(self) -> None:
        if self.prepared.layers:
            index_hash = self.report.index_hash
            stored = save_deltas(
                self.report.adapter_config,
                self.prepared,
                self.master,
                self.output.adapter,
                self.device,
                index_encoding=self.config.export.index_encoding,
            )
            if stored is not None and index_hash is not None and stored.index_hash != index_hash:
                raise RuntimeError(
                    f"the indices in {self.output.adapter} hash to {stored.index_hash}, but the last event left "
                    f"{index_hash}: this is a defect, please report it"
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
