"""Saving and going on: what a checkpoint holds, collected from the engine, the Trainer and the run."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments, set_seed

from sparse_ds.checkpoint.index import TRAINER_STATE_FILE
from sparse_ds.checkpoint.random_generators import CUDA_GENERATOR, read_generators, write_generators
from sparse_ds.checkpoint.reading import Checkpoint
from sparse_ds.checkpoint.run_folder import checkpoint_path, remove_old_checkpoints
from sparse_ds.checkpoint.writing import CheckpointWrite, IndexContent, SavedSlice, copy_to_host
from sparse_ds.checkpoint.zero3_state import check_entry, find_problem
from sparse_ds.config import RunConfig, UserError
from sparse_ds.distributed import process_group
from sparse_ds.model.base_checkpoint import BaseCheckpoint
from sparse_ds.training.engine_state import EngineCounters, EngineState
from sparse_ds.training.setup import PreparedModel

if TYPE_CHECKING:
    from sparse_ds.training.trainer import SparseTrainer

logger = logging.getLogger("sparse_ds")

FREE_METHOD_KEYS = ("gradient_tile_mib", "gradient_accumulator_limit_gib")
"""Keys of `method` that bound memory and change no number."""
ROW_PREFIX = "ranks/"
"""Of tensors with one row per rank; no module's name has a slash."""


def run_identity(
    config: RunConfig, base: BaseCheckpoint, prepared: PreparedModel, data_fingerprint: str, global_batch_size: int
) -> dict[str, Any]:
    """What a checkpoint and the run that goes on from it must have in common, in plain JSON types."""
    model = config.model
    method = {key: value for key, value in config.to_dict()["method"].items() if key not in FREE_METHOD_KEYS}
    return {
        "base": {
            "name": model.name_or_path,
            "revision": model.revision,
            "fingerprint": base.fingerprint(),
            "quantization": model.quantization,
            "double_quantization": model.double_quantization,
            "dtype": model.dtype,
        },
        "task": model.task,
        "labels": None if prepared.classification is None else list(prepared.classification.labels),
        "method": method,
        "momentum": config.optimizer.momentum,
        "active_weights": {name: layer.layout.num_active for name, layer in prepared.layers.items()},
        "data": data_fingerprint,
        "global_batch_size": global_batch_size,
        "seed": config.train.seed,
    }


def check_same_run(identity: dict[str, Any]) -> None:
    """All ranks carry out the same run on the same data.

    Collectives: one gather of some hashes; every rank must call it.

    Raises:
        UserError: on every rank; says what differs, and on which ranks.
    """
    digests = {
        key: hashlib.sha256(json.dumps(value, sort_keys=True).encode()).digest() for key, value in identity.items()
    }
    everywhere = process_group.gather_objects(digests)
    for key, digest in everywhere[0].items():
        different = [rank for rank, other in enumerate(everywhere) if other.get(key) != digest]
        if different:
            raise UserError(
                f"the ranks do not carry out the same run: {key} of ranks {different} is not that of rank 0. Give all "
                "hosts the same configuration, base model and data."
            )


@runtime_checkable
class SavedCallback(Protocol):
    """A callback of the Trainer with numbers of its own that a resumed run goes on with."""

    def saved_state(self) -> dict[str, Any]:
        """Plain JSON types."""
        ...

    def restore_state(self, state: dict[str, Any]) -> None:
        """Take over what `saved_state` returned, now or in a file of unknown origin.

        Raises:
            KeyError, TypeError, ValueError: it is something else.
        """
        ...


class Best(BaseModel):
    """The checkpoint with the lowest held-out loss."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    step: int
    heldout_loss: float


class RunState(BaseModel):
    """`run_state` of the index."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    engine: EngineCounters
    scheduler: dict[str, Any]
    epoch: int
    """Whole passes over the data, a function of step and data: for readers."""
    step_in_epoch: int
    last_logged_step: int
    best: Best | None
    callbacks: dict[str, dict[str, Any]]
    """Class name -> state of each `SavedCallback`."""
    report: dict[str, Any]
    """What the run itself wants back."""


@dataclass
class _InFlight:
    """A checkpoint that the thread is writing."""

    write: CheckpointWrite
    slices: Sequence[SavedSlice]
    content: IndexContent
    best: Best | None
    thread: threading.Thread
    sha256: str | None = None
    failure: Exception | None = None


class RunCheckpoints:
    """Saves and restores one run.

    Args:
        config: the run.
        identity: `run_identity`.
        folder: output folder of the run.
        trainer: the run's Trainer.
        engine: what trains.
        steps_per_epoch: optimizer steps of one pass over the data.
    """

    def __init__(
        self,
        config: RunConfig,
        identity: dict[str, Any],
        folder: Path,
        trainer: SparseTrainer,
        engine: EngineState,
        steps_per_epoch: int,
    ) -> None:
        self._settings, self._seed = config.checkpoint, config.train.seed
        self._identity, self._folder = identity, folder
        self._trainer, self._engine, self._steps_per_epoch = trainer, engine, steps_per_epoch
        self._device: torch.device = trainer.args.device
        self._in_flight: _InFlight | None = None
        self._generators: dict[str, Tensor] = {}
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
        Collectives: those of `CheckpointWrite` and two small gathers; every rank must call it.

        Raises:
            UserError: writing failed (disk full) and `checkpoint.on_save_error` is `stop`; earlier ones stay.
        """
        self.finish()
        if self._engine.is_paused:
            return
        step = self._trainer.state.global_step
        best = self._best_with(step, heldout_loss)
        try:
            write = CheckpointWrite(checkpoint_path(self._folder, step), step)
        except UserError as error:
            return self._fail(error)
        slices = [*self._engine.slices(step), *self._rows()]
        run_state = self._run_state(step, report, best).model_dump()
        content = IndexContent(self._identity, run_state, _trainer_state_text(self._trainer.state))
        if self._settings.background:
            slices = copy_to_host(slices)
        in_flight = _InFlight(write, slices, content, best, threading.Thread())
        in_flight.thread = threading.Thread(target=_write, args=(in_flight,), daemon=True)
        self._in_flight = in_flight
        in_flight.thread.start()
        if not self._settings.background:
            self.finish()

    def poll(self) -> None:
        """Publish what is in flight, if all ranks have written. Collectives: a gather while something is in flight."""
        in_flight = self._in_flight
        if in_flight is not None and all(process_group.gather_objects(not in_flight.thread.is_alive())):
            self.finish()

    def finish(self) -> None:
        """Wait for what is in flight and publish it; nothing otherwise.

        Collectives: an agreement, a gather and those of `CheckpointWrite.publish`; every rank must call it.

        Raises:
            UserError: as `save`.
        """
        in_flight, self._in_flight = self._in_flight, None
        if in_flight is None:
            return
        in_flight.thread.join()
        try:
            with process_group.agreement(f"saving the checkpoint of step {in_flight.write.step}"):
                if in_flight.failure is not None:
                    raise in_flight.failure
        except UserError as error:
            in_flight.write.abandon()
            return self._fail(error)
        hashes = [str(sha256) for sha256 in process_group.gather_objects(in_flight.sha256)]
        try:
            in_flight.write.publish(hashes, {item.name: item.entry for item in in_flight.slices}, in_flight.content)
        except UserError as error:
            return self._fail(error)
        self.best = in_flight.best
        if process_group.rank() == 0:
            best_step = self.best.step if self._settings.best and self.best is not None else None
            remove_old_checkpoints(self._folder, self._settings.keep, best_step)

    def restore(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Take over everything but the random generators, see `restore_generators`; returns the report.

        Collectives: an agreement on success; every rank must call it. Gathered parameters must be released after it.

        Raises:
            UserError: the checkpoint does not fit this run.
        """
        with process_group.agreement("restoring the checkpoint"):
            state = self._read_run_state(checkpoint)
            names = self._engine.restore(checkpoint, state.engine)
            names |= self._restore_sums(checkpoint, state)
            names |= self._restore_generators(checkpoint)
            unknown = sorted(checkpoint.names - names)
            if unknown:
                raise UserError(f"checkpoint {checkpoint.folder}: tensor {unknown[0]!r} is not of this run.")
            self._restore_scheduler(checkpoint, state.scheduler)
            self._restore_callbacks(checkpoint, state.callbacks)
            # Intervals are those of the configuration, not of the checkpoint.
            self._trainer.state.compute_steps(self._trainer.args, self._trainer.state.max_steps)
        checkpoint.close()
        self.best = state.best if self._is_there(state.best) else None
        return state.report

    def restore_generators(self) -> None:
        """Set the random generators back: before the first forward pass, after the data loader has drawn its seed.

        With another number of ranks they begin anew from (seed, step, rank). Collectives: none.
        """
        if self._generators:
            write_generators(self._generators, self._device)
        else:
            step = self._trainer.state.global_step
            set_seed((self._seed + 1_000_003 * step + process_group.rank()) % 2**32)

    def describe(self) -> list[str]:
        """What is to be said at the end of the run."""
        lines = []
        if self.num_failed:
            lines.append(f"{self.num_failed} checkpoint(s) could not be written")
        if self._settings.best and self.best is not None:
            path = checkpoint_path(self._folder, self.best.step)
            lines.append(f"lowest held-out loss of all checkpoints: {self.best.heldout_loss:.4f}, {path}")
        return lines

    def _fail(self, error: UserError) -> None:
        """On all ranks alike."""
        self.num_failed += 1
        if self._settings.on_save_error == "stop":
            raise error
        logger.warning("%s Training goes on without it (checkpoint.on_save_error).", error)

    def _best_with(self, step: int, heldout_loss: float | None) -> Best | None:
        """The best when this one is there too."""
        if heldout_loss is None or not heldout_loss < (float("inf") if self.best is None else self.best.heldout_loss):
            return self.best
        return Best(step=step, heldout_loss=heldout_loss)

    def _is_there(self, best: Best | None) -> bool:
        return best is not None and checkpoint_path(self._folder, best.step).is_dir()

    def _rows(self) -> list[SavedSlice]:
        """What belongs to this data-parallel position."""
        rows = read_generators(self._device)
        rows["loss_sum"] = self._trainer.loss_sum.detach().float().view(1).cpu()
        rows["num_tokens"] = torch.tensor([self._trainer.num_uncounted_tokens])
        return [SavedSlice.of_row(ROW_PREFIX + name, row) for name, row in rows.items()]

    def _restore_sums(self, checkpoint: Checkpoint, state: RunState) -> set[str]:
        """Loss (a mean over ranks) and tokens (a sum over ranks) since the last log line."""
        saved_ranks, rank = checkpoint.index.num_state_files, process_group.rank()
        names = [f"{ROW_PREFIX}loss_sum", f"{ROW_PREFIX}num_tokens"]
        for name, dtype in zip(names, (torch.float32, torch.int64), strict=True):
            check_entry(checkpoint, name, dtype, saved_ranks)
        losses, tokens = (checkpoint.read(name) for name in names)
        if find_problem(tokens, limit=2**48):
            raise UserError(f"checkpoint {checkpoint.folder}: tensor {names[1]!r} {find_problem(tokens, limit=2**48)}.")
        if saved_ranks == process_group.world_size():
            loss, num_tokens = losses[rank], int(tokens[rank])
        else:
            loss, num_tokens = losses.mean(), int(tokens.sum()) if rank == 0 else 0
        self._trainer.set_sums(float(loss), num_tokens, state.last_logged_step)
        return set(names)

    def _restore_generators(self, checkpoint: Checkpoint) -> set[str]:
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
                    f"checkpoint {checkpoint.folder}: the state of a random generator is damaged."
                ) from error
        return names

    def _run_state(self, step: int, report: dict[str, Any], best: Best | None) -> RunState:
        callbacks = self._trainer.callback_handler.callbacks
        return RunState(
            engine=self._engine.counters(),
            scheduler=self._trainer.lr_scheduler.state_dict(),
            epoch=step // self._steps_per_epoch,
            step_in_epoch=step % self._steps_per_epoch,
            last_logged_step=self._trainer.last_logged_step,
            best=best,
            callbacks={
                type(each).__name__: each.saved_state() for each in callbacks if isinstance(each, SavedCallback)
            },
            report=report,
        )

    def _read_run_state(self, checkpoint: Checkpoint) -> RunState:
        try:
            state = RunState.model_validate(checkpoint.index.run_state)
        except ValidationError as error:
            where = ".".join(str(part) for part in error.errors()[0]["loc"])
            raise UserError(f"checkpoint {checkpoint.folder}: `run_state.{where}` is not what a run writes.") from error
        position = divmod(checkpoint.index.step, self._steps_per_epoch)
        if (state.epoch, state.step_in_epoch) != position or not 0 <= state.last_logged_step <= checkpoint.index.step:
            raise UserError(
                f"checkpoint {checkpoint.folder}: is of epoch {state.epoch}, step {state.step_in_epoch} in it; "
                f"expected {position[0]}, {position[1]} by the data of this run."
            )
        return state

    def _restore_scheduler(self, checkpoint: Checkpoint, saved: dict[str, Any]) -> None:
        scheduler = self._trainer.lr_scheduler
        current = scheduler.state_dict()
        if saved.keys() != current.keys() or not all(_has_form(saved[key], current[key]) for key in current):
            raise UserError(f"checkpoint {checkpoint.folder}: `run_state.scheduler` is not of this run's schedule.")
        # The place in the schedule is the checkpoint's, the rate and the length of the schedule are this run's.
        scheduler.load_state_dict({**saved, "base_lrs": current["base_lrs"]})
        rates = [
            base_rate * factor(scheduler.last_epoch)
            for base_rate, factor in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
        ]
        scheduler._last_lr = rates
        for group, rate in zip(self._engine.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def _restore_callbacks(self, checkpoint: Checkpoint, saved: dict[str, dict[str, Any]]) -> None:
        for callback in self._trainer.callback_handler.callbacks:
            name = type(callback).__name__
            if not isinstance(callback, SavedCallback) or name not in saved:
                continue
            try:
                callback.restore_state(saved[name])
            except (KeyError, TypeError, ValueError) as error:
                raise UserError(
                    f"checkpoint {checkpoint.folder}: `run_state.callbacks.{name}` is not what a run writes."
                ) from error


class PublishCheckpoints(TrainerCallback):
    """At the end of each step: a checkpoint that all ranks have written in the background appears."""

    def __init__(self, checkpoints: RunCheckpoints) -> None:
        self._checkpoints = checkpoints

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._checkpoints.poll()


def check_trainer_state(checkpoint: Checkpoint) -> None:
    """transformers will be able to read its part. Collectives: none.

    Raises:
        UserError: it is something else, or of another step.
    """
    try:
        state = TrainerState.load_from_json(str(checkpoint.folder / TRAINER_STATE_FILE))
        is_fine = state.global_step == checkpoint.index.step and float(state.epoch) >= 0 and state.epoch < 2**48
    except (OSError, TypeError, ValueError, RecursionError):
        is_fine = False
    if not is_fine:
        raise UserError(f"checkpoint {checkpoint.folder}: {TRAINER_STATE_FILE} is not what a run writes.")


def _trainer_state_text(state: TrainerState) -> str:
    """What `TrainerState.save_to_json` writes; rank 0 needs it."""
    return json.dumps(asdict(state), indent=2, sort_keys=True) + "\n" if process_group.rank() == 0 else ""


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


def _write(in_flight: _InFlight) -> None:
    """In the thread: no collective."""
    try:
        in_flight.sha256 = in_flight.write.write(in_flight.slices)
    except Exception as error:
        in_flight.failure = error
