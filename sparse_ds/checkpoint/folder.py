"""The files of one checkpoint: written whole or not at all, checked before they are used.

checkpoint-<step>/
  state-00001.safetensors ...   <module>.indices   int32/int64 [K]      what trains and its optimizer state, global
                                <module>.values    fp32 [K]             (independent of rank and world size)
                                <module>.exp_avg   fp32 [K]             per-weight state, if there is any
                                <module>.row_accumulator, .col_accumulator   fp32 [O], [I]
  trainer_state.json            transformers' TrainerState (step, epoch, log)
  checkpoint.json               format, identity of the run, scheduler, sha256 of every other file and of its own
                                content; written last
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparse_ds.checkpoint.atomic_folder import atomic_folder
from sparse_ds.config.errors import UserError

INDEX_FILE = "checkpoint.json"
TRAINER_STATE_FILE = "trainer_state.json"
FORMAT_NAME, FORMAT_VERSION = "sparse_ds.checkpoint", 1
CHECKSUM_KEY = "sha256"
"""In the index: the hash of the rest of it."""
SHARD_BYTES = 2**31
"""State is written in files of about 2 GiB, so that the writing rank holds no more than that."""


class CheckpointIndex(BaseModel):
    """The content of checkpoint.json."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    format: str = FORMAT_NAME
    format_version: int = FORMAT_VERSION
    step: int
    """Optimizer steps done."""
    identity: dict[str, Any]
    """What must be the same for a run to go on from here: base model, method, targets."""
    run_state: dict[str, Any]
    """What the run needs besides tensors: scheduler, counters, what was measured before the first step."""
    files: dict[str, str] = {}
    """File name -> sha256."""


class CheckpointWriter:
    """Takes tensors one at a time and writes them in shards; used inside `writing_checkpoint`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._waiting: dict[str, Tensor] = {}
        self._waiting_bytes = 0
        self._num_shards = 0

    def add(self, name: str, tensor: Tensor) -> None:
        """Take one tensor; it is copied to the host."""
        self._waiting[name] = tensor.detach().cpu().contiguous()
        self._waiting_bytes += tensor.numel() * tensor.element_size()
        if self._waiting_bytes >= SHARD_BYTES:
            self._write_shard()

    def finish(self, index: CheckpointIndex) -> None:
        """Write what is left, then the index."""
        if self._waiting:
            self._write_shard()
        hashes = {path.name: _sha256(path) for path in sorted(self.folder.iterdir())}
        content = index.model_copy(update={"files": hashes}).model_dump()
        text = json.dumps({**content, CHECKSUM_KEY: _checksum(content)}, indent=2)
        (self.folder / INDEX_FILE).write_text(text + "\n", encoding="utf-8")

    def _write_shard(self) -> None:
        self._num_shards += 1
        path = self.folder / f"state-{self._num_shards:05d}.safetensors"
        save_file(self._waiting, path, metadata={"format": "pt"})
        self._waiting, self._waiting_bytes = {}, 0


def writing_checkpoint(run_folder: Path, step: int) -> AbstractContextManager[Path]:
    """Context that yields the folder to write into; it appears as `checkpoint-<step>` when the context ends well."""
    return atomic_folder(checkpoint_path(run_folder, step), marker=INDEX_FILE, overwrite=True)


def checkpoint_path(run_folder: Path, step: int) -> Path:
    """Where the checkpoint of a step lies."""
    return run_folder / f"checkpoint-{step}"


def list_checkpoints(run_folder: Path) -> list[Path]:
    """Checkpoints of a run, oldest first."""
    folders = [path for path in run_folder.glob("checkpoint-*") if path.is_dir()]
    found = [(int(match[1]), path) for path in folders if (match := _STEP.match(path.name))]
    return [path for _, path in sorted(found)]


_STEP = re.compile(r"^checkpoint-(\d+)$")


def remove_old_checkpoints(run_folder: Path, keep: int) -> None:
    """Delete all but the `keep` newest."""
    for path in list_checkpoints(run_folder)[:-keep]:
        shutil.rmtree(path, ignore_errors=True)


def remove_checkpoints_after(run_folder: Path, step: int) -> None:
    """Delete those of later steps: they are not of the run that goes on from `step`."""
    for path in _checkpoints_after(run_folder, step):
        shutil.rmtree(path)


def _checkpoints_after(run_folder: Path, step: int) -> list[Path]:
    return [path for path in list_checkpoints(run_folder) if int(path.name.removeprefix("checkpoint-")) > step]


class Checkpoint:
    """A checkpoint folder whose every byte has been checked.

    Raises:
        UserError: a file is missing, damaged (sha256), of another format or a newer version.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.index = _read_index(folder)
        for name, expected in self.index.files.items():
            path = folder / name
            if path.name != name or not path.is_file():
                raise UserError(f"checkpoint {folder}: {name} is missing. Use another checkpoint.")
            if _sha256(path) != expected:
                raise UserError(
                    f"checkpoint {folder}: {name} is damaged (its sha256 is not the one in {INDEX_FILE}). Use another "
                    "checkpoint."
                )
        self._file_of: dict[str, str] = {}
        for name in self.index.files:
            if name.endswith(".safetensors"):
                with self._open(name) as file:
                    self._file_of.update(dict.fromkeys(file.keys(), name))

    @property
    def names(self) -> set[str]:
        """All tensors."""
        return set(self._file_of)

    def read(self, name: str, start: int = 0, num_elements: int | None = None) -> Tensor:
        """Elements [start, start + num_elements) of a 1-D tensor, all of it by default; only these are read."""
        with self._open(self._file_of[name]) as file:
            piece = file.get_slice(name)
            end = piece.get_shape()[0] if num_elements is None else start + num_elements
            tensor: Tensor = piece[start:end]
            return tensor

    def num_elements(self, name: str) -> int:
        """Elements of one tensor."""
        with self._open(self._file_of[name]) as file:
            return int(file.get_slice(name).get_shape()[0])

    def _open(self, name: str) -> Any:
        try:
            return safe_open(self.folder / name, framework="pt")
        except (SafetensorError, OSError) as error:
            raise UserError(f"checkpoint {self.folder}: {name} cannot be read ({error}).") from error


def find_checkpoint(run_folder: Path, resume: str) -> tuple[Checkpoint, list[str]]:
    """The checkpoint to go on from.

    Args:
        run_folder: output folder of the run.
        resume: "auto" for the newest whole checkpoint of the run, or a path.

    Returns:
        The checkpoint, and what was wrong with newer ones that were passed over (for "auto").

    Raises:
        UserError: there is none, or the one named is damaged or not the newest of the run's own.
    """
    if resume != "auto":
        folder = Path(resume)
        if not folder.is_dir():
            raise UserError(
                f"checkpoint.resume: {resume!r} is no folder; expected a checkpoint-<step> folder or `auto`."
            )
        checkpoint = Checkpoint(folder)
        later = _checkpoints_after(run_folder, checkpoint.index.step)
        if later and folder.resolve().parent == run_folder.resolve():
            raise UserError(
                f"checkpoint.resume: {folder} is not the newest checkpoint of {run_folder}: "
                f"{', '.join(path.name for path in later)} would not belong to the run that goes on from it. Choose "
                "another train.output_dir, remove them, or go on from the newest with `auto`."
            )
        return checkpoint, []
    problems: list[str] = []
    for folder in reversed(list_checkpoints(run_folder)):
        try:
            return Checkpoint(folder), problems
        except UserError as error:
            problems.append(str(error))
    found = f" (passed over: {' '.join(problems)})" if problems else ""
    raise UserError(
        f"checkpoint.resume: auto, but {run_folder} holds no whole checkpoint{found}. Start anew with "
        "`--set train.overwrite=true`, or give a path."
    )


def check_identity(saved: dict[str, Any], current: dict[str, Any], folder: Path) -> None:
    """Refuse to go on from another run's checkpoint.

    Raises:
        UserError: lists every difference; of a table (one number a layer) the first and how many there are.
    """
    differences = list(_describe_differences(saved, current))
    if differences:
        raise UserError(
            f"checkpoint.resume: {folder} belongs to another run. Differences: {'; '.join(differences)}. Use the "
            "configuration that wrote it, or start anew."
        )


def _describe_differences(saved: dict[str, Any], current: dict[str, Any]) -> Iterator[str]:
    for key in sorted(saved.keys() | current.keys()):
        left, right = saved.get(key), current.get(key)
        if left == right:
            continue
        if isinstance(left, dict) and isinstance(right, dict):
            inner = list(_describe_differences(left, right))
            more = f" (and {len(inner) - 1} more)" if len(inner) > 1 else ""
            yield f"{key}.{inner[0]}{more}"
        else:
            yield f"{key}: checkpoint {left!r}, this run {right!r}"


def _read_index(folder: Path) -> CheckpointIndex:
    path = folder / INDEX_FILE
    damaged = f"checkpoint {folder}: {INDEX_FILE} is damaged or of another format. Use another checkpoint."
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"checkpoint {folder}: has no readable {INDEX_FILE} ({error.strerror}).") from error
    except ValueError as error:
        raise UserError(damaged) from error
    if not isinstance(content, dict) or not isinstance(content.get("format_version"), int):
        raise UserError(damaged)
    if content.get("format") != FORMAT_NAME or content["format_version"] > FORMAT_VERSION:
        raise UserError(
            f"checkpoint {folder}: format {content.get('format')} version {content['format_version']}, expected "
            f"{FORMAT_NAME} up to version {FORMAT_VERSION}. Use the version of sparse_ds that wrote it, or a newer one."
        )
    if content.pop(CHECKSUM_KEY, None) != _checksum(content):
        raise UserError(damaged)
    try:
        return CheckpointIndex.model_validate(content)
    except ValidationError as error:
        raise UserError(damaged) from error


def _checksum(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
