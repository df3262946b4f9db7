"""The adapter inside a checkpoint of a run: what trains at that step, without the optimizer's state."""

from __future__ import annotations

import math
from pathlib import Path

from pydantic import ValidationError
from torch import Tensor

from sparse_ds.adapter.adapter import Adapter, AdapterConfig, Deltas
from sparse_ds.adapter.valid_deltas import deltas_problem, dense_problem
from sparse_ds.checkpoint.reading import Checkpoint
from sparse_ds.checkpoint.zero3_state import find_problem
from sparse_ds.config.errors import UserError
from sparse_ds.sparse.layout import SparseLayout

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
        indices_U, values_K = (self._checkpoint.read(f"{module_name}.{kind}") for kind in ("indices", "values"))
        if indices_U.numel() == values_K.numel():
            return Deltas(indices_U, values_K.clone())
        # Only matrices hold blocks, not biases and norms.
        layout = self._block_layout(module_name)
        if layout is None or indices_U.numel() * layout.block_elements != values_K.numel():
            self._refuse(f"tensor {module_name!r} has {indices_U.numel()} indices and {values_K.numel()} values")
        assert layout is not None
        problem = find_problem(indices_U, layout.num_positions, ascending=True)
        if problem:
            self._refuse(f"tensor '{module_name}.indices' {problem}")
        return Deltas(*layout.sorted_weights(indices_U, values_K))

    def _block_layout(self, module_name: str) -> SparseLayout | None:
        """Shape and blocks of a matrix; None where the checkpoint's run has no blocks that divide it."""
        method = self._checkpoint.index.identity.get("method")
        sides = method.get("block_size") if isinstance(method, dict) else None
        shape = self.config.shapes[module_name]
        if not (isinstance(sides, list) and len(sides) == 2 and all(type(side) is int and side > 0 for side in sides)):
            return None
        if shape[0] % sides[0] or shape[1] % sides[1]:
            return None
        return SparseLayout(shape[0], shape[1], 0, block_rows=sides[0], block_cols=sides[1])

    def read_dense(self, name: str) -> Tensor:
        tensor, shape = self._checkpoint.read(name), self.config.dense_shapes[name]
        return tensor.view(shape) if tensor.numel() == math.prod(shape) else tensor

    def _refuse(self, problem: str | None) -> None:
        if problem:
            raise UserError(f"checkpoint {self.folder}: {problem}. Use another checkpoint.")
