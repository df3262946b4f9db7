"""What a merge did to each matrix: how large the trained change is, and how large the error of the 4-bit base.

With W the original weight, Q the dequantized one that training saw, and D the deltas, all norms over the whole matrix:

    |D|        what was trained
    |W - Q|    what quantization had changed before; merged into Q the model is the trained one, merged into W it is
               another model, which is off by W - Q
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**22


@dataclass(frozen=True)
class MatrixReport:
    """One target matrix (or bias, or norm).

    Attributes:
        num_weights: elements.
        num_deltas: trained weights.
        num_nonzero_deltas: of these.
        num_hidden_deltas: non-zero deltas that the rounding to the training dtype hides: the merged weight equals the
            base weight.
        deltas_norm: |D|, the 2-norm.
        quantization_error_norm: |W - Q|; None without quantization, or where W is not there any more.
    """

    num_weights: int
    num_deltas: int
    num_nonzero_deltas: int
    num_hidden_deltas: int
    deltas_norm: float
    quantization_error_norm: float | None = None

    @property
    def error_dominates(self) -> bool:
        """The error of quantization is larger than what was trained."""
        return self.quantization_error_norm is not None and self.quantization_error_norm > self.deltas_norm


def difference_norm(left: Tensor, right: Tensor) -> float:
    """|left - right| over all elements, in fp32 by chunks and in fp64 over them; shapes and devices are the same."""
    squares = 0.0
    left_N, right_N = left.reshape(-1), right.reshape(-1)
    for start in range(0, left_N.numel(), CHUNK_ELEMENTS):
        chunk = slice(start, start + CHUNK_ELEMENTS)
        squares += float(torch.linalg.vector_norm(left_N[chunk].float() - right_N[chunk].float())) ** 2
    return math.sqrt(squares)


def describe_error(matrices: dict[str, MatrixReport], *, merged_into_original: bool) -> str | None:
    """One sentence on the error of the 4-bit base beside what was trained; None where there is none."""
    errors = {name: each for name, each in matrices.items() if each.quantization_error_norm is not None}
    if not errors:
        return None
    num_dominated = sum(each.error_dominates for each in errors.values())
    deltas = math.sqrt(sum(each.deltas_norm**2 for each in errors.values()))
    error = math.sqrt(sum((each.quantization_error_norm or 0.0) ** 2 for each in errors.values()))
    finding = (
        f"the 4-bit base differs from the original weights by {error:.4g} (2-norm over {len(errors)} matrices), "
        f"training changed it by {deltas:.4g}; in {num_dominated} of {len(errors)} matrices the error is larger"
    )
    if merged_into_original:
        return f"{finding}. Merged into the original weights this is not the model that was trained: compare both."
    return f"{finding}. The merged model is the one that was trained, on the 4-bit base."


def report_json(matrices: dict[str, MatrixReport]) -> dict[str, Any]:
    """Plain JSON types, module by module."""
    return {name: {**asdict(each), "error_dominates": each.error_dominates} for name, each in matrices.items()}
