"""The folder of one run: what may be in it at the start, and where everything goes."""

from __future__ import annotations

import json
import os
import shutil
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sparse_ds.checkpoint.atomic_folder import remove_leftovers
from sparse_ds.config.errors import UserError
from sparse_ds.config.schema import PEFT_FORMATS

VERSIONED_PACKAGES = (
    "sparse-ds",
    "torch",
    "deepspeed",
    "transformers",
    "accelerate",
    "bitsandbytes",
    "datasets",
    "safetensors",
)


class OutputFolder:
    """Paths of one run.

    resolved_config.json   the configuration with every default and override, and the versions
    metrics.jsonl          one object a line
    adapter/               the deltas
    adapter_<format>/      the same for PEFT
    merged/                the dense model
    checkpoint-<step>/     see `checkpoint`
    """

    def __init__(self, path: str) -> None:
        self.path = Path(path)
        self.resolved_config = self.path / "resolved_config.json"
        self.metrics = self.path / "metrics.jsonl"
        self.adapter = self.path / "adapter"
        self.merged = self.path / "merged"

    def peft_adapter(self, peft_format: str) -> Path:
        """Where the adapter for PEFT goes."""
        return self.path / f"adapter_{peft_format}"

    @property
    def results(self) -> tuple[Path, ...]:
        """Folders that a finished run may have."""
        return (self.adapter, *map(self.peft_adapter, PEFT_FORMATS), self.merged)

    def goes_on(self, resume: str | None) -> bool:
        """Whether a run with this `checkpoint.resume` goes on with the run that is in the folder."""
        return resume == "auto" or (resume is not None and Path(resume).resolve().is_relative_to(self.path.resolve()))

    def check(self, *, overwrite: bool, resume: str | None) -> None:
        """Refuse to mix two runs. Only looks, so every rank may call it at any time before `create`.

        Raises:
            UserError: the folder holds a run that is neither to be overwritten nor to go on, or both; it is a file;
                it holds something else.
        """
        if not self.path.exists():
            return
        if not self.path.is_dir():
            raise UserError(f"train.output_dir: {self.path} is a file; expected a folder or a new name.")
        holds_run = self.resolved_config.exists() or self.metrics.exists()
        if overwrite and self.goes_on(resume):
            raise UserError(
                f"train.overwrite: got true (begin anew in {self.path}) together with checkpoint.resume {resume}, "
                "which would be deleted. Choose one of the two, or another train.output_dir."
            )
        if holds_run and not overwrite and not self.goes_on(resume):
            raise UserError(
                f"train.output_dir: {self.path} already holds a run. Choose another folder, start anew with "
                "`--set train.overwrite=true`, or go on with `--resume auto`."
            )
        if not holds_run and any(self.path.iterdir()) and not self._looks_like_ours():
            raise UserError(
                f"train.output_dir: {self.path} is not empty and holds no run of sparse_ds; nothing in it is touched. "
                "Choose another folder."
            )

    def check_unfinished(self) -> None:
        """A run without a checkpoint may begin anew only as long as it has no result.

        Raises:
            UserError: the folder holds an adapter or a merged model.
        """
        for result in self.results:
            if result.exists():
                raise UserError(
                    f"checkpoint.resume: auto, but {self.path} holds no checkpoint and a finished run "
                    f"({result.name}/). Start anew with `--set train.overwrite=true`, or choose another folder."
                )

    def _looks_like_ours(self) -> bool:
        known = {result.name for result in self.results}
        return all(entry.name in known or entry.name.startswith("checkpoint-") for entry in self.path.iterdir())

    def create(self, resolved: dict[str, Any], *, resume: str | None) -> None:
        """Make the folder and write resolved_config.json (rank 0 only). An old run's files go, unless it goes on."""
        try:
            if self.path.exists() and not self.goes_on(resume):
                for entry in (self.resolved_config, self.metrics, *self.results):
                    _remove(entry)
                for entry in self.path.glob("checkpoint-*"):
                    _remove(entry)
            self.path.mkdir(parents=True, exist_ok=True)
            remove_leftovers(self.path)
            text = json.dumps({**resolved, "versions": versions()}, indent=2)
            temporary = self.resolved_config.with_suffix(".json.tmp")
            temporary.write_text(text + "\n", encoding="utf-8")
            os.replace(temporary, self.resolved_config)
        except OSError as error:
            raise UserError(
                f"train.output_dir: cannot write to {self.path} ({error.strerror or error}); expected a folder with "
                "write permission and room."
            ) from error


def versions() -> dict[str, str]:
    """Versions of what decides a run's numbers."""
    found = {}
    for package in VERSIONED_PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            found[package] = "not installed"
    return found


def _remove(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry)
    elif entry.exists() or entry.is_symlink():
        entry.unlink()
