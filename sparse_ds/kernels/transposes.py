"""Contiguous transposes of activations: a copy, so compiled and eager ones are the same bits.

torch's own copy of a transposed matrix runs on one thread and without vectors. The loop that inductor writes takes half
the time on one thread and a quarter on two (1024 x 2048, bf16, AMD EPYC with AVX-512).
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_ds.kernels.compilation import CompiledUpdate

MIN_COMPILED_ELEMENTS = 2**20
"""Smaller matrices are copied eagerly: what is won (0.3 ms a copy) does not pay for seconds of compiling."""


def _copy_transposed(target_NM: Tensor, matrix_MN: Tensor) -> None:
    target_NM.copy_(matrix_MN.t())


_compiled = CompiledUpdate(lambda: _copy_transposed, "the transpose of activations")


@torch.no_grad()
def transposed(matrix_MN: Tensor) -> Tensor:
    """[N, M] contiguous; a new tensor, unless `matrix_MN` is the transpose of a contiguous one."""
    worth_it = matrix_MN.device.type == "cpu" and matrix_MN.numel() >= MIN_COMPILED_ELEMENTS
    if worth_it and matrix_MN.is_contiguous() and not _compiled.failed:
        target_NM = torch.empty(matrix_MN.shape[1], matrix_MN.shape[0], dtype=matrix_MN.dtype)
        if _compiled.run(target_NM, matrix_MN.detach()):
            return target_NM
    return matrix_MN.t().contiguous()
