"""The gradient of the values one by one: of the dense gradient only what is asked for is computed.

    g_k = dY^T[row(k)] . X^T[col(k)]

Both transposes are contiguous, so each value is the inner product of two rows of T numbers.

On the CPU this is the gradient of the weights of a weighted `embedding_bag`: bag o is row o of dY^T, the table is X^T,
and what k looks up is col(k). In 16 bits it rounds every sum to 16 bits; many values take the loop that inductor writes
for the formula above instead, which sums in fp32 and takes 0.7 to 0.9 of the time (Intel Xeon with AMX). In fp32
embedding_bag is the faster one. On a GPU it is a kernel of `triton_kernels`.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_ds.kernels import triton_kernels
from sparse_ds.kernels.compilation import CompiledUpdate
from sparse_ds.kernels.product_operands import ProductOperands

SUM_MODE = 0
"""Of embedding_bag: a bag is the weighted sum of its rows."""
MIN_COMPILED_PRODUCTS = 2**23
"""K * T from which the compiled loop is taken: with fewer, waking the threads takes as long as the products."""


def can_sample(operands: ProductOperands) -> bool:
    """Whether there is a kernel for these tensors."""
    return operands.input_TI.device.type == "cpu" or triton_kernels.available(operands.input_TI)


def sampled_values_gradient(operands: ProductOperands, indices_K: Tensor) -> Tensor:
    """The gradient of K values; see `values_gradient` for arguments and result.

    Memory: the transposes (on a GPU that of the input), and 8 bytes per value.
    """
    if triton_kernels.available(operands.input_TI):
        return triton_kernels.sampled_gradient(operands.grad_output_TO.contiguous(), operands.input_IT, indices_K)
    rows_K = indices_K // operands.num_cols
    cols_K = indices_K - rows_K * operands.num_cols
    if operands.input_TI.element_size() == 2 and cols_K.numel() * operands.num_tokens >= MIN_COMPILED_PRODUCTS:
        gradient_K = torch.empty(cols_K.numel(), dtype=torch.float32)
        if _compiled.run(gradient_K, operands.grad_output_OT, operands.input_IT, rows_K, cols_K):
            return gradient_K
    bag_gradient_K: Tensor = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        operands.grad_output_OT, operands.input_IT, cols_K, cols_K[:0], rows_K, SUM_MODE
    )
    return bag_gradient_K.float()


def _inner_products(
    gradient_K: Tensor, grad_output_OT: Tensor, input_IT: Tensor, rows_K: Tensor, cols_K: Tensor
) -> None:
    gradient_K.copy_((grad_output_OT[rows_K].float() * input_IT[cols_K].float()).sum(1))


_compiled = CompiledUpdate(lambda: _inner_products, "the sampled gradient of the values")
