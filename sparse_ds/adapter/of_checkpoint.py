"""The adapter inside a checkpoint of a run: what trains at that step, without the optimizer's state."""

from __future__ import annotations

import math
from pathlib import Path

from pydantic import ValidationError
from torch import Tensor

from sparse_ds.adapter.adapter import Adapter, AdapterConfig, Deltas
from sparse_ds.adapter.valid_deltas import deltas_problem, dense_problem
from sparse_ds.checkpoint.reading import Checkpoint
from sparse_ds.config.errors import UserError

REPORT_KEY = "adapter"
"""Of a run's report in the index: an `AdapterConfig`."""


class CheckpointAdapter(Adapter):
    """Reads `checkpoint-<step>`.

    Args:
        folder: of the checkpoint; every byte of it is checked.

    Raises:
        UserError: damaged, or without an adapter (method `full`, or of an older version).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._checkpoint = Checkpoint(folder)
        self._checkpoint.verify()
        report = self._checkpoint.index.run_state.get("report")
        stored = report.get(REPORT_KEY) if isinstance(report, dict) else None
        if stored is None:
            raise UserError(
                f"checkpoint {folder} holds no adapter: its run trains every weight, or was of an older version of "
                "sparse_ds. Go on with its run, whose end writes the model."
            )
        try:
            self.config = AdapterConfig.model_validate(stored)
        except ValidationError as error:
            where = ".".join(str(part) for part in error.errors()[0]["loc"])
            raise UserError(
                f"checkpoint {folder}: `run_state.report.adapter.{where}` is not what a run writes."
            ) from error
        for name, shape in self.config.shapes.items():
            self._refuse(deltas_problem(name, shape, self.read(name)))
        for name, dense_shape in self.config.dense_shapes.items():
            self._refuse(dense_problem(name, dense_shape, self.read_dense(name)))

    def read(self, module_name: str) -> Deltas:
        return Deltas(
            self._checkpoint.read(f"{module_name}.indices"), self._checkpoint.read(f"{module_name}.values").clone()
        )

    def read_dense(self, name: str) -> Tensor:
        tensor, shape = self._checkpoint.read(name), self.config.dense_shapes[name]
        return tensor.view(shape) if tensor.numel() == math.prod(shape) else tensor

    def _refuse(self, problem: str | None) -> None:
        if problem:
            raise UserError(f"checkpoint {self.folder}: {problem}. Use another checkpoint.")
