"""A checkpoint that all ranks write: begun, written, published. See docs/checkpoints.md, "How it is written"."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from sparse_ds.checkpoint.atomic_folder import abandon_folder, begin_folder, finish_folder, flush_to_disk
from sparse_ds.checkpoint.index import (
    INDEX_FILE,
    TRAINER_STATE_FILE,
    CheckpointIndex,
    TensorEntry,
    index_text,
    sha256_of_file,
    state_file,
)
from sparse_ds.checkpoint.tensor_file import DTYPES, write_tensors
from sparse_ds.config.errors import UserError
from sparse_ds.distributed import process_group

T = TypeVar("T")


@dataclass(frozen=True)
class SavedSlice:
    """This rank's part of one global 1-D tensor.

    Attributes:
        name: of the tensor; the same tensors in the same order on every rank.
        part: [n] this rank's elements, those of `entry.slice_of_file(rank)`.
        entry: size and slicing of the tensor, the same on every rank.
    """

    name: str
    part: Tensor
    entry: TensorEntry

    @classmethod
    def of_rank(cls, name: str, part: Tensor, num_elements: int, slice_elements: int) -> SavedSlice:
        """From this rank's elements."""
        entry = TensorEntry(dtype=DTYPES[part.dtype], num_elements=num_elements, slice_elements=max(slice_elements, 1))
        assert part.numel() == entry.slice_of_file(process_group.rank())[1], f"{name}: {part.numel()} of {entry}"
        return cls(name, part, entry)

    @classmethod
    def of_replicated(cls, name: str, whole: Tensor) -> SavedSlice:
        """From a 1-D tensor that every rank has: each rank writes as much of it."""
        size = -(-whole.numel() // process_group.world_size())
        begin = min(process_group.rank() * size, whole.numel())
        return cls.of_rank(name, whole[begin : begin + size], whole.numel(), size)

    @classmethod
    def of_row(cls, name: str, row: Tensor) -> SavedSlice:
        """From one of as many rows of equal length as there are ranks."""
        return cls.of_rank(name, row, row.numel() * process_group.world_size(), row.numel())


@dataclass(frozen=True)
class IndexContent:
    """What rank 0 writes besides hashes and sizes: see `CheckpointIndex`."""

    identity: dict[str, Any]
    run_state: dict[str, Any]
    trainer_state: str
    """The text of trainer_state.json."""


class CheckpointWrite:
    """One checkpoint being written: `write` once, then `publish` or `abandon`.

    Args:
        folder: where it will appear.
        step: optimizer steps done.

    Collectives: an agreement and a broadcast of a path; every rank must call it.

    Raises:
        UserError: rank 0 cannot make the folder, or another rank does not see it.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self.folder, self.step = folder, step
        self._partial = Path(
            process_group.from_rank_0(
                f"beginning {folder}",
                lambda: str(
                    self._explain_failure(lambda: begin_folder(folder, marker=INDEX_FILE, overwrite=True).absolute())
                ),
            )
        )
        with process_group.agreement(f"beginning {folder}"):
            if not self._partial.is_dir():
                raise UserError(
                    f"checkpoint of step {step}: {self._partial} was made by rank 0 but is not there; expected "
                    "train.output_dir on a file system that all hosts share."
                )

    def write(self, slices: Sequence[SavedSlice]) -> str:
        """Write this rank's file; returns its sha256. Collectives: none, so any thread may call it.

        Raises:
            UserError: it cannot be written (disk full).
        """
        name = state_file(process_group.rank(), process_group.world_size())
        tensors = {item.name: item.part for item in slices if item.part.numel()}
        assert len({item.name for item in slices}) == len(slices), "a tensor came twice"
        return self._explain_failure(lambda: write_tensors(self._partial / name, tensors))

    def publish(self, hashes: Sequence[str], entries: Mapping[str, TensorEntry], content: IndexContent) -> None:
        """Let the checkpoint appear.

        Args:
            hashes: what `write` returned on each rank.
            entries: of all tensors.
            content: what else is in the index; used on rank 0.

        Collectives: those of `from_rank_0`; every rank must call it.

        Raises:
            UserError: rank 0 cannot write; nothing is left behind.
        """

        def finish() -> None:
            try:
                self._explain_failure(lambda: self._finish(hashes, entries, content))
            except BaseException:
                abandon_folder(self._partial)
                raise

        process_group.from_rank_0(f"publishing {self.folder}", finish)

    def abandon(self) -> None:
        """Give up; rank 0 removes the folder when no rank writes any more. Collectives: none."""
        if process_group.rank() == 0:
            abandon_folder(self._partial)

    def _finish(self, hashes: Sequence[str], entries: Mapping[str, TensorEntry], content: IndexContent) -> None:
        trainer_state = self._partial / TRAINER_STATE_FILE
        trainer_state.write_text(content.trainer_state, encoding="utf-8")
        names = [state_file(number, len(hashes)) for number in range(len(hashes))]
        index = CheckpointIndex(
            step=self.step,
            identity=content.identity,
            run_state=content.run_state,
            num_state_files=len(hashes),
            tensors=dict(entries),
            files={**dict(zip(names, hashes, strict=True)), TRAINER_STATE_FILE: sha256_of_file(trainer_state)},
        )
        index_path = self._partial / INDEX_FILE
        index_path.write_text(index_text(index), encoding="utf-8")
        for path in (trainer_state, index_path):
            flush_to_disk(path)
        finish_folder(self._partial, self.folder)

    def _explain_failure(self, action: Callable[[], T]) -> T:
        try:
            return action()
        except OSError as error:
            raise UserError(
                f"checkpoint of step {self.step}: {self.folder} cannot be written ({error.strerror or error}). Older "
                "checkpoints are untouched. Make room or give write permission, and go on with `--resume auto`."
            ) from error


def copy_to_host(slices: Sequence[SavedSlice]) -> list[SavedSlice]:
    """Copies that training does not change. Memory: all of this rank's part, on the host."""
    copies = []
    for item in slices:
        host = torch.empty(item.part.shape, dtype=item.part.dtype)
        copies.append(SavedSlice(item.name, host.copy_(item.part.detach()), item.entry))
    return copies
