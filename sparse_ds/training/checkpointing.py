"""The checkpoints of one run: saved in the foreground or background, kept, gone on from. See docs/checkpoints.md."""

from __future__ import annotations

import logging
import threading
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparse_ds.checkpoint.reading import Checkpoint
from sparse_ds.checkpoint.run_folder import checkpoint_path, remove_old_checkpoints
from sparse_ds.checkpoint.writing import CheckpointWrite, IndexContent, SavedSlice, copy_to_host
from sparse_ds.config import UserError
from sparse_ds.config.schema import CheckpointConfig
from sparse_ds.distributed import process_group
from sparse_ds.training.engine_state import EngineCounters, EngineState
from sparse_ds.training.trainer_progress import TrainerCounters, TrainerProgress

logger = logging.getLogger("sparse_ds")


class Best(BaseModel):
    """The checkpoint with the lowest held-out loss."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    step: int
    heldout_loss: float


class RunState(BaseModel):
    """`run_state` of the index."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    engine: EngineCounters
    trainer: TrainerCounters
    best: Best | None
    """Of the checkpoints up to this one."""
    report: dict[str, Any]
    """What the run itself wants back."""


class _Saving:
    """One checkpoint between its begin and its end.

    Args:
        write: where it goes.
        slices: this rank's part, not changed by anybody until it is written.
        content: what rank 0 writes besides.
        best: the best when this one is there.
    """

    def __init__(
        self, write: CheckpointWrite, slices: list[SavedSlice], content: IndexContent, best: Best | None
    ) -> None:
        self.write, self.slices, self.content, self.best = write, slices, content, best
        self.sha256 = ""
        self.failure: Exception | None = None
        self.thread = threading.Thread(target=self.run, name="checkpoint", daemon=True)

    def run(self) -> None:
        """Write this rank's file. Collectives: none."""
        try:
            self.sha256 = self.write.write(self.slices)
        except Exception as error:
            self.failure = error


class RunCheckpoints:
    """Saves and restores one run.

    Args:
        settings: section `checkpoint` of the configuration.
        identity: `run_identity`.
        folder: output folder of the run.
        engine: what trains.
        progress: how far the Trainer is.
    """

    def __init__(
        self,
        settings: CheckpointConfig,
        identity: dict[str, Any],
        folder: Path,
        engine: EngineState,
        progress: TrainerProgress,
    ) -> None:
        self._settings, self._identity, self._folder = settings, identity, folder
        self._engine, self._progress = engine, progress
        self._in_flight: _Saving | None = None
        self.best: Best | None = None
        self.num_failed = 0
        """Checkpoints that could not be written."""

    def save(self, report: dict[str, Any], heldout_loss: float | None = None) -> None:
        """Write `checkpoint-<step>` and delete old ones; in the background only begin to.

        Before the one event of a method that selects once nothing has been trained, and nothing is saved.

        Args:
            report: what the run wants back from `restore`, in plain JSON types.
            heldout_loss: measured after this step, if it was.

        Memory: in the background a copy of this rank's part on the host, else one tensor.
        Collectives: those of `CheckpointWrite` and of `EngineState.slices`, two agreements and a gather; every rank
        must call it.

        Raises:
            UserError: writing failed (disk full) and `checkpoint.on_save_error` is `stop`; earlier ones stay.
        """
        self.finish()
        if self._engine.is_paused:
            return
        step = self._progress.step
        try:
            write = CheckpointWrite(checkpoint_path(self._folder, step), step)
        except UserError as error:
            return self._fail(error)
        try:
            with process_group.agreement(f"collecting the state of step {step}"):
                self._in_flight = self._collect(write, step, report, heldout_loss)
        except BaseException:
            write.abandon()
            raise
        if self._settings.background:
            self._in_flight.thread.start()
        else:
            self._in_flight.run()
            self.finish()

    def poll(self) -> None:
        """Publish what is in flight, if all ranks have written. Collectives: a gather while something is in flight."""
        saving = self._in_flight
        if saving is not None and all(process_group.gather(not saving.thread.is_alive())):
            self.finish()

    def finish(self) -> None:
        """Wait for what is in flight and publish it; nothing otherwise.

        Collectives: an agreement, a gather and those of `CheckpointWrite.publish`; every rank must call it.

        Raises:
            UserError: as `save`.
        """
        saving, self._in_flight = self._in_flight, None
        if saving is None:
            return
        if saving.thread.ident is not None:
            saving.thread.join()
        try:
            with process_group.agreement(f"saving the checkpoint of step {saving.write.step}"):
                if saving.failure is not None:
                    raise saving.failure
            hashes = process_group.gather(saving.sha256)
            saving.write.publish(hashes, {item.name: item.entry for item in saving.slices}, saving.content)
        except UserError as error:
            saving.write.abandon()
            return self._fail(error)
        except BaseException:
            saving.write.abandon()
            raise
        self.best = saving.best
        if process_group.rank() == 0:
            best_step = self.best.step if self._settings.best and self.best is not None else None
            remove_old_checkpoints(self._folder, self._settings.keep, best_step)

    def restore(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Take over everything but the random generators (`TrainerProgress.restore_generators`); returns the report.

        Collectives: an agreement on success; every rank must call it. Gathered parameters must be released after it.

        Raises:
            UserError: the checkpoint does not fit this run.
        """
        with process_group.agreement("restoring the checkpoint"):
            try:
                state = RunState.model_validate(checkpoint.index.run_state)
            except ValidationError as error:
                where = ".".join(str(part) for part in error.errors()[0]["loc"])
                raise UserError(
                    f"checkpoint {checkpoint.folder}: `run_state.{where}` is not what a run writes."
                ) from error
            names = self._engine.restore(checkpoint, state.engine) | self._progress.restore(checkpoint, state.trainer)
            unknown = sorted(checkpoint.names - names)
            if unknown:
                raise UserError(f"checkpoint {checkpoint.folder}: tensor {unknown[0]!r} is not of this run.")
        checkpoint.close()
        if state.best is not None and checkpoint_path(self._folder, state.best.step).is_dir():
            self.best = state.best
        return state.report

    def describe(self) -> list[str]:
        """What is to be said at the end of the run."""
        lines = []
        if self.num_failed:
            lines.append(f"{self.num_failed} checkpoint(s) could not be written")
        if self._settings.best and self.best is not None:
            path = checkpoint_path(self._folder, self.best.step)
            lines.append(f"lowest held-out loss of all checkpoints: {self.best.heldout_loss:.4f}, {path}")
        return lines

    def _collect(
        self, write: CheckpointWrite, step: int, report: dict[str, Any], heldout_loss: float | None
    ) -> _Saving:
        # First, before anything that may fail on one rank only: it may communicate.
        slices = [*self._engine.slices(step), *self._progress.slices()]
        best = self.best
        if heldout_loss is not None and heldout_loss < (float("inf") if best is None else best.heldout_loss):
            best = Best(step=step, heldout_loss=heldout_loss)
        state = RunState(
            engine=self._engine.counters(), trainer=self._progress.counters(), best=best, report=report
        ).model_dump()
        # Rank 0 writes it.
        trainer_state = self._progress.state_text() if process_group.rank() == 0 else ""
        if self._settings.background:
            slices = copy_to_host(slices)
        return _Saving(write, slices, IndexContent(self._identity, state, trainer_state), best)

    def _fail(self, error: UserError) -> None:
        """On all ranks alike."""
        self.num_failed += 1
        if self._settings.on_save_error == "stop":
            raise error
        logger.warning("%s Training goes on without it (checkpoint.on_save_error).", error)


class PublishCheckpoints(TrainerCallback):
    """At the end of each step: a checkpoint that all ranks have written in the background appears."""

    def __init__(self, checkpoints: RunCheckpoints) -> None:
        self._checkpoints = checkpoints

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._checkpoints.poll()
