"""PEFT's `supertuning` format (peft >= 0.21): flat int32 indices and fp32 values, added to a 16-bit or 32-bit base.

    adapter_model.safetensors     base_model.model.<module>.supertuning_indices   int32 [N]
                                  base_model.model.<module>.supertuning_values    fp32 [N]
    N of a matrix with n weights = int(n * (1 - sparsity)), `sparsity` one number of the whole model

It loads through `PeftModel`, `AutoPeftModel...`, `AutoModel....from_pretrained(folder)` and `load_adapter`.

Numbers. PEFT computes `w + value.to(w.dtype)` in the dtype of the base. In fp32 that is the merged weight of this
project, bit for bit. In bf16 the value is rounded before the sum and the sum again, where this project rounds once: the
two differ by at most |value| / 256 and one unit in the last place of the weight (`docs/peft.md` says how often).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import SupertuningConfig
from torch import Tensor

from sparse_ds.adapter.adapter import Adapter, AdapterConfig, tensor_name
from sparse_ds.adapter.peft_formats.reading import PeftAdapter
from sparse_ds.adapter.peft_formats.writing import PeftExport, PeftFormat, PeftPlan, write_peft_folder
from sparse_ds.config.errors import UserError

PARTS = ("supertuning_indices", "supertuning_values")


def save_supertuning(
    adapter: Adapter, output: Path | str, *, base_name: str | None = None, overwrite: bool = False
) -> PeftExport:
    """Write a `supertuning` adapter; arguments, memory and errors as `writing.write_peft_folder`.

    Raises:
        UserError: also deltas of biases or norms, and a matrix of 2^31 weights or more.
    """
    return write_peft_folder(_SupertuningFormat(), adapter, output, base_name=base_name, overwrite=overwrite)


class SupertuningAdapter(PeftAdapter):
    """A `supertuning` folder, written by this project or by PEFT; arguments and errors as `PeftAdapter`.

    PEFT leaves the indices out with `save_precomputed_indices=False`: they are the weights of the base that are
    largest (or smallest) by magnitude, in that order. Here they are computed from the base as it is stored, and refused
    where two of these magnitudes are equal, since then the order is up to the machine.
    """

    peft_type = "SUPERTUNING"
    parts = PARTS

    def _check_config(self) -> None:
        if self.peft_config.r is not None:
            raise UserError(
                f"Adapter '{self.folder}' has low-rank parts beside the sparse ones (r is {self.peft_config.r}), which "
                "are no deltas. Merge the adapter with PEFT, and import the difference to the base."
            )

    def _positions(self, module_name: str) -> Tensor:
        name = self._stored_names.get(f"{module_name}.{PARTS[0]}")
        if name is None:
            return self._largest_weights(module_name)
        positions_N = self._read(name, (torch.int32, torch.int64), num_dims=1).long()
        self._check_range(name, positions_N, math.prod(self.config.shapes[module_name]))
        return positions_N

    def _largest_weights(self, module_name: str) -> Tensor:
        scores_N = self._base.checkpoint.read(tensor_name(module_name)).abs().flatten()
        num_entries = num_peft_entries(scores_N.numel(), self.peft_config.sparsity)
        largest = self.peft_config.select_top
        best = torch.topk(scores_N, num_entries, largest=largest)
        num_as_good = int((scores_N >= best.values[-1] if largest else scores_N <= best.values[-1]).sum())
        if num_as_good != num_entries or bool((best.values[1:] == best.values[:-1]).any()):
            raise UserError(
                f"Adapter '{self.folder}' holds no indices (save_precomputed_indices is false), and weights of "
                f"'{module_name}' have equal magnitudes in base '{self._base.checkpoint.folder}': the order of its "
                "values is not known. Merge it with PEFT where it was trained, and import the difference to the base."
            )
        return best.indices


class _SupertuningFormat(PeftFormat):
    peft_type: ClassVar[str] = "SUPERTUNING"
    parts: ClassVar[tuple[str, str]] = PARTS
    config_class: ClassVar[type[Any]] = SupertuningConfig

    def check(self, config: AdapterConfig) -> None:
        for name, (rows, cols) in config.shapes.items():
            if rows * cols >= 2**31:
                raise UserError(
                    f"'{name}' has {rows} x {cols} weights; PEFT's supertuning stores their positions as int32, which "
                    "ends at 2^31. Export it as a merged model or as a native adapter."
                )

    def plan(self, shapes: Mapping[str, tuple[int, int]], num_active: Mapping[str, int]) -> PeftPlan:
        num_elements = {name: rows * cols for name, (rows, cols) in shapes.items()}
        sparsity = find_sparsity({name: (max(1, num_active[name]), num_elements[name]) for name in shapes})
        return PeftPlan(
            {name: num_peft_entries(num_elements[name], sparsity) for name in shapes}, {"sparsity": sparsity}
        )

    def stored_indices(self, indices_N: Tensor, shape: tuple[int, int]) -> Tensor:
        return indices_N.int()

    def notes(self, config: AdapterConfig) -> list[str]:
        if config.base.dtype == "float32":
            return ["Over the base in float32 the model is the trained one, bit for bit."]
        return [
            "PEFT rounds each delta to the dtype of the base before it adds it, training did not: over a bfloat16 base "
            "a small part of the trained weights differs in the last place."
        ]

    def warnings(self, config: AdapterConfig) -> list[str]:
        if config.base.quantization == "none":
            return []
        return [
            "The adapter was trained over a 4-bit NF4 base, but supertuning needs a 16-bit one, whose weights are not "
            "those that it was trained on. Export as shira and load it over the 4-bit base, or as a merged model."
        ]


def num_peft_entries(num_elements: int, sparsity: float) -> int:
    """Entries of a matrix: `SupertuningLayer._num_trainable` of peft 0.21, in its floating-point arithmetic."""
    return int(num_elements * (1 - sparsity))


def find_sparsity(wanted: Mapping[str, tuple[int, int]]) -> float:
    """The largest sparsity that gives every matrix its entries: matrix -> (entries, weights).

    1 - sparsity is the largest density of a matrix, up to the rounding of `num_peft_entries`.
    """
    sparsity = 1.0 - max(num_entries / num_elements for num_entries, num_elements in wanted.values())
    while any(num_peft_entries(numel, sparsity) < num_entries for num_entries, numel in wanted.values()):
        sparsity = math.nextafter(sparsity, 0.0)
    return sparsity
