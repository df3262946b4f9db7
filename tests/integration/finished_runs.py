"""What a run has left in its output folder."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor


@dataclass(frozen=True)
class FinishedRun:
    """The content of an output folder."""

    folder: Path
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    adapter: dict[str, Tensor]

    @classmethod
    def read(cls, folder: Path) -> FinishedRun:
        lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        return cls(
            folder=folder,
            config=json.loads((folder / "resolved_config.json").read_text(encoding="utf-8")),
            metrics=[json.loads(line) for line in lines],
            adapter=load_file(folder / "adapter" / "adapter_model.safetensors"),
        )

    def of_kind(self, kind: str) -> list[dict[str, Any]]:
        """The lines of one kind, in their order."""
        return [record for record in self.metrics if record["kind"] == kind]

    def by_step(self, kind: str, field: str) -> dict[int, Any]:
        """step -> one field of the lines of one kind."""
        return {record["step"]: record[field] for record in self.of_kind(kind)}

    @property
    def losses(self) -> dict[int, float]:
        """step -> loss."""
        return self.by_step("step", "loss")

    @property
    def index_hashes(self) -> dict[int, str]:
        """step of an event -> hash of all indices after it."""
        return self.by_step("event", "index_hash")

    @property
    def summary(self) -> dict[str, Any]:
        """The summary; a run has one."""
        (summary,) = self.of_kind("summary")
        return summary


def index_overlap(left: FinishedRun, right: FinishedRun) -> float:
    """Share of the active weights that two runs have in common at their end."""
    names = [name for name in left.adapter if name.endswith(".indices")]
    common = sum(int(torch.isin(left.adapter[name], right.adapter[name]).sum()) for name in names)
    return common / sum(left.adapter[name].numel() for name in names)
