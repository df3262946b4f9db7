"""The checkpoints of one run: which there are, which to go on from, which to delete."""

from __future__ import annotations

import contextlib
import logging
import re
from pathlib import Path

from sparse_ds.checkpoint.atomic_folder import remove_folder
from sparse_ds.checkpoint.reading import Checkpoint
from sparse_ds.config.errors import UserError
from sparse_ds.distributed import process_group

logger = logging.getLogger("sparse_ds")

_STEP = re.compile(r"^checkpoint-(\d+)$")


def checkpoint_path(run_folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run_folder / f"checkpoint-{step}"


def list_checkpoints(run_folder: Path) -> list[Path]:
    """Checkpoints of a run, oldest first."""
    folders = [path for path in run_folder.glob("checkpoint-*") if path.is_dir()]
    found = [(int(match[1]), path) for path in folders if (match := _STEP.match(path.name))]
    return [path for _, path in sorted(found)]


def remove_old_checkpoints(run_folder: Path, keep: int, best_step: int | None = None) -> None:
    """Delete all but the `keep` newest and the one of `best_step`. One that cannot be deleted stays."""
    for path in list_checkpoints(run_folder)[:-keep]:
        if best_step is None or path != checkpoint_path(run_folder, best_step):
            with contextlib.suppress(OSError):
                remove_folder(path)


def remove_checkpoints_after(run_folder: Path, step: int) -> None:
    """Delete those of later steps: they are not of the run that goes on from `step`."""
    for path in _checkpoints_after(run_folder, step):
        remove_folder(path)


def _checkpoints_after(run_folder: Path, step: int) -> list[Path]:
    return [path for path in list_checkpoints(run_folder) if int(path.name.removeprefix("checkpoint-")) > step]


def find_checkpoint(run_folder: Path, resume: str) -> Checkpoint | None:
    """The checkpoint to go on from, every byte of it checked, each rank checking a share of the files.

    Args:
        run_folder: output folder of the run.
        resume: "auto" for the newest whole checkpoint of the run, or a path.

    Returns:
        None for "auto" where no checkpoint has been written yet. What was wrong with newer ones that were passed over
        is logged.

    Collectives: a broadcast of names, and an agreement per checkpoint looked at; every rank must call it.

    Raises:
        UserError: there are checkpoints but no whole one; the one named is damaged or not the newest of the run's own.
    """
    if resume != "auto":
        return _open_named(run_folder, Path(resume))
    names = process_group.from_rank_0(
        f"listing the checkpoints in {run_folder}", lambda: [path.name for path in list_checkpoints(run_folder)]
    )
    problems: list[str] = []
    for name in reversed(names):
        try:
            checkpoint = _open(run_folder / name)
        except UserError as error:
            problems.append(str(error))
            continue
        for problem in problems:
            logger.warning("passed over: %s", problem)
        return checkpoint
    if not problems:
        return None
    raise UserError(
        f"checkpoint.resume: auto, but {run_folder} holds no whole checkpoint (passed over: {' '.join(problems)}). "
        "Start anew with `--set train.overwrite=true`, or give a path."
    )


def _open_named(run_folder: Path, folder: Path) -> Checkpoint:
    with process_group.agreement("finding the checkpoint"):
        if not folder.is_dir():
            raise UserError(
                f"checkpoint.resume: {str(folder)!r} is no folder; expected a checkpoint-<step> folder or `auto`."
            )
    checkpoint = _open(folder)
    with process_group.agreement("finding the checkpoint"):
        later = _checkpoints_after(run_folder, checkpoint.index.step)
        if later and folder.resolve().parent == run_folder.resolve():
            raise UserError(
                f"checkpoint.resume: {folder} is not the newest checkpoint of {run_folder}: "
                f"{', '.join(path.name for path in later)} would not belong to the run that goes on from it. Choose "
                "another train.output_dir, remove them, or go on from the newest with `auto`."
            )
    return checkpoint


def _open(folder: Path) -> Checkpoint:
    with process_group.agreement(f"reading {folder}"):
        checkpoint = Checkpoint(folder)
        checkpoint.verify(process_group.rank(), process_group.world_size())
    return checkpoint
