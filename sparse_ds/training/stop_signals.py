"""Asked to stop from outside: finish the step, save, exit with STOPPED_EXIT_CODE; asked twice: exit at once.

    SIGTERM     what clusters and launchers send before they kill
    SIGINT      Ctrl-C
    SIGUSR1     SLURM's early signal (`#SBATCH --signal=USR1@120`)
    launcher    its process has gone: what it started must not train on unseen

The signal may reach one rank only, each rank at another step, or all of them twice (a terminal sends Ctrl-C to the
launcher and to the ranks, and the launcher sends it on). So the ranks agree (`StopTogether`) on the step after which
they stop, and the second signal is one that comes some seconds after the first.

Signals are taken by a thread, from the file descriptor that Python's C handler writes to: the main thread handles none
while it waits in a collective.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from sparse_ds.config.errors import STOPPED_EXIT_CODE, RunStoppedError
from sparse_ds.distributed.process_group import world_size
from sparse_ds.distributed.zero3_partitions import all_reduce_max_

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
SECOND_SIGNAL_AFTER_S = 3.0
"""Earlier ones are copies of the first: `deepspeed` sends two at a distance of 0.1 s, a terminal and `torchrun` both
send Ctrl-C."""
LAUNCHER_CHECK_S = 1.0
GENERATIONS_OF_LAUNCHER = {"deepspeed": 2, "torchrun": 1, "accelerate": 1}
"""How many processes above a rank belong to its launcher; `deepspeed` starts one that starts the ranks."""


class StopSignals:
    """Takes the signals while the context is open.

    Args:
        rank: of this process, for messages.
        launcher: who started this process, see `complete_environment`.
    """

    def __init__(self, rank: int, launcher: str) -> None:
        self._rank, self._launcher = rank, launcher
        self.wanted_by: str | None = None
        """Why this rank wants to stop (`SIGTERM`); None while it does not."""
        self._first_s = 0.0
        self._is_over = False
        self._previous: dict[signal.Signals, Any] = {}

    def __enter__(self) -> StopSignals:
        self._ancestors = _ancestors(GENERATIONS_OF_LAUNCHER.get(self._launcher, 0))
        self._read_end, self._write_end = os.pipe()
        os.set_blocking(self._write_end, False)
        self._previous_descriptor = signal.set_wakeup_fd(self._write_end, warn_on_full_buffer=False)
        for each in SIGNALS:
            # Without a handler of Python's own the C handler is not there. This one has nothing left to do.
            self._previous[each] = signal.signal(each, lambda number, frame: None)
            signal.siginterrupt(each, False)
        self._thread = threading.Thread(target=self._take, name="sparse_ds signals", daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._is_over = True
        signal.set_wakeup_fd(self._previous_descriptor)
        # A launcher that ends its ranks one after the other sends a signal to those that are just ending as asked.
        has_stopped = isinstance(error, RunStoppedError)
        for each, handler in self._previous.items():
            signal.signal(each, signal.SIG_IGN if has_stopped else handler)
        os.close(self._write_end)
        self._thread.join()
        os.close(self._read_end)

    def _take(self) -> None:
        while not self._is_over:
            ready, _, _ = select.select([self._read_end], [], [], LAUNCHER_CHECK_S)
            if ready:
                numbers = os.read(self._read_end, 64)
                if not numbers:
                    return
                for number in numbers:
                    if number in SIGNALS:
                        self._want(signal.Signals(number).name, number)
            elif self.wanted_by is None and self._ancestors != _ancestors(len(self._ancestors)):
                self._want(f"the end of {self._launcher}", None)

    def _want(self, reason: str, number: int | None) -> None:
        now_s = time.monotonic()
        if self.wanted_by is None:
            self.wanted_by, self._first_s = reason, now_s
            self._say(f"{reason}: finishing the step, then saving; a second signal ends the run at once")
        elif number is not None and now_s - self._first_s >= SECOND_SIGNAL_AFTER_S and not self._is_over:
            self._say(f"{reason}, the second signal: ending at once, nothing is saved")
            os._exit(128 + number)

    def _say(self, text: str) -> None:
        # Not by `logging`, whose lock the main thread may hold. A launcher that has gone may have closed the pipe.
        with contextlib.suppress(OSError):
            print(f"sparse_ds (rank {self._rank}): {text}", file=sys.stderr, flush=True)


class StopTogether(TrainerCallback):
    """Stops the training of all ranks after the same step, with a checkpoint, when one of them is asked to.

    After a step at which an evaluation is due it is left out, since little time may be left; `evaluation_due` tells the
    run that goes on to make it up.

    Collectives: one all-reduce of 4 bytes after every step and every evaluation; on every rank.

    Args:
        signals: of this rank.
        device: of the process group.
    """

    def __init__(self, signals: StopSignals, device: torch.device) -> None:
        self._signals, self._device = signals, device
        self.is_stopping = False
        """Whether all ranks have agreed to stop."""
        self.evaluation_due = False
        """Whether the step after which the run stops was to be followed by an evaluation."""

    def saved_state(self) -> dict[str, Any]:
        """For a checkpoint, in plain JSON types."""
        return {"evaluation_due": self.evaluation_due}

    def restore_state(self, state: dict[str, Any]) -> None:
        """Take over what `saved_state` returned."""
        self.evaluation_due = bool(state["evaluation_due"])

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._agree()
        if self.is_stopping:
            raise RunStoppedError(
                f"stopped by {self.reason} before step {state.global_step + 1}: there is nothing new to save",
                STOPPED_EXIT_CODE,
            )

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._agree()
        if self.is_stopping:
            self.evaluation_due, control.should_evaluate = control.should_evaluate, False
            control.should_training_stop = control.should_save = True

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._agree()
        if self.is_stopping:
            control.should_training_stop = control.should_save = True

    @property
    def reason(self) -> str:
        """As this rank knows it."""
        return self._signals.wanted_by or "a signal to another rank"

    def _agree(self) -> None:
        wanted = torch.tensor([float(self._signals.wanted_by is not None)])
        if world_size() > 1:
            all_reduce_max_(wanted, self._device)
        self.is_stopping = self.is_stopping or bool(wanted)


def _ancestors(num_generations: int) -> list[int]:
    """Process ids of the parent, its parent and so on; where the system does not tell, fewer."""
    found: list[int] = []
    process_id = os.getppid()
    while len(found) < num_generations:
        found.append(process_id)
        try:
            # pid (name) state parent ...; the name may hold anything but ends with the last parenthesis.
            process_id = int(Path(f"/proc/{process_id}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])
        except (OSError, ValueError, IndexError):
            break
    return found
