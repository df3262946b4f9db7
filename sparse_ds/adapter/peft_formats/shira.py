"""PEFT's `shira` format: (row, column) pairs, and values that also work over a bitsandbytes 4-bit base.

    adapter_model.safetensors     base_model.model.<module>.shira_indices   int32 [2, N], row and column
                                  base_model.model.<module>.shira_weight    fp32 [N]
    N of a matrix [out, in] = r * (in + out), `r` one number of the whole model, N at most in * out

`mask_type` says how PEFT drew the positions; here it is never "random", with which transformers' own loaders would draw
new ones and give a wrong model in silence. They cannot load this format at all (the positions are neither parameters
nor buffers) and fail with a KeyError in the forward pass: load it through `PeftModel`.

Numbers. PEFT adds the fp32 values to the weight of the base as round(fp32 w + value), which is this project's rule, so
the model is the trained one bit for bit. Of a 4-bit base w is the dequantized weight, as in training, so it is also
there. But merging into a 4-bit base (PEFT's `merge_and_unload`) quantizes the sum again, which hides most deltas.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

import torch
from peft import ShiraConfig
from torch import Tensor

from sparse_ds.adapter.adapter import Adapter, AdapterConfig
from sparse_ds.adapter.peft_formats.reading import PeftAdapter
from sparse_ds.adapter.peft_formats.writing import PeftExport, PeftFormat, PeftPlan, write_peft_folder
from sparse_ds.config.errors import UserError

PARTS = ("shira_indices", "shira_weight")
MASK_TYPE = "sparse_ds"
"""Anything that PEFT does not know: it then takes the positions from the file."""


def save_shira(
    adapter: Adapter, output: Path | str, *, base_name: str | None = None, overwrite: bool = False
) -> PeftExport:
    """Write a `shira` adapter; arguments, memory and errors as `writing.write_peft_folder`.

    Raises:
        UserError: also deltas of biases or norms, and a density that no `r` gives to all matrices.
    """
    return write_peft_folder(_ShiraFormat(), adapter, output, base_name=base_name, overwrite=overwrite)


class ShiraAdapter(PeftAdapter):
    """A `shira` folder, written by this project or by PEFT; arguments and errors as `PeftAdapter`."""

    peft_type = "SHIRA"
    parts = PARTS

    def _positions(self, module_name: str) -> Tensor:
        name = self._stored_names[f"{module_name}.{PARTS[0]}"]
        # On Windows PEFT stores these as fp32, which is exact below 2^24.
        stored = self._read(name, (torch.int32, torch.int64, torch.float32), num_dims=2)
        pairs_2N = stored.long()
        if stored.shape[0] != 2 or not torch.equal(pairs_2N.to(stored.dtype), stored):
            raise self._bad(name, f"has shape {list(stored.shape)}, expected [2, N] whole numbers: rows and columns")
        num_rows, num_cols = self.config.shapes[module_name]
        self._check_range(name, pairs_2N[0], num_rows, "row ")
        self._check_range(name, pairs_2N[1], num_cols, "column ")
        return pairs_2N[0] * num_cols + pairs_2N[1]


class _ShiraFormat(PeftFormat):
    peft_type: ClassVar[str] = "SHIRA"
    parts: ClassVar[tuple[str, str]] = PARTS
    config_class: ClassVar[type[Any]] = ShiraConfig

    def plan(self, shapes: Mapping[str, tuple[int, int]], num_active: Mapping[str, int]) -> PeftPlan:
        r = max(1, *(-(-num_active[name] // sum(shape)) for name, shape in shapes.items()))
        for name, (rows, cols) in shapes.items():
            if r * (rows + cols) > rows * cols:
                raise UserError(
                    f"PEFT's shira has one r for all matrices, here {r}, and '{name}' [{rows}, {cols}] has room "
                    f"for at most {rows * cols // (rows + cols)}. Export it as supertuning, as a merged model or as a "
                    "native adapter."
                )
        return PeftPlan({name: r * sum(shape) for name, shape in shapes.items()}, {"r": r, "mask_type": MASK_TYPE})

    def stored_indices(self, indices_N: Tensor, shape: tuple[int, int]) -> Tensor:
        num_cols = shape[1]
        return torch.stack([indices_N // num_cols, indices_N % num_cols]).int()

    def notes(self, config: AdapterConfig) -> list[str]:
        if config.base.quantization == "nf4":
            return [
                "Load it over the same 4-bit base: the deltas were trained on its dequantized weights. Do not merge it "
                "into that base with PEFT, which would quantize the sum again; sparse_ds merges it into a 16-bit model."
            ]
        return ["Over the base in the dtype of the training, the model is the trained one, bit for bit."]
