"""What makes deltas valid: checked before they are written, and after they are read from anywhere."""

from __future__ import annotations

import torch
from torch import Tensor

from sparse_ds.adapter.adapter import Deltas
from sparse_ds.sparse.layout import SparseLayout


def index_dtype(shape: tuple[int, int]) -> torch.dtype:
    """int32, or int64 for a matrix of 2^31 weights or more."""
    return SparseLayout(num_rows=shape[0], num_cols=shape[1], num_active=0).index_dtype


def dense_problem(name: str, shape: tuple[int, ...], tensor: Tensor) -> str | None:
    """What is wrong with a tensor that trained as a whole, or None."""
    if tensor.dtype != torch.float32 or tuple(tensor.shape) != shape:
        return (
            f"tensor '{name}' has dtype {tensor.dtype} and shape {list(tensor.shape)}, expected torch.float32 and "
            f"{list(shape)}"
        )
    if not bool(tensor.isfinite().all()):
        return f"tensor '{name}' holds numbers that are NaN or infinite"
    return None


def deltas_problem(module_name: str, shape: tuple[int, int], deltas: Deltas) -> str | None:
    """What is wrong with the deltas of one module of `shape`, or None."""
    indices_K, values_K = deltas
    numel = shape[0] * shape[1]
    indices_name, values_name = f"tensor '{module_name}.indices'", f"tensor '{module_name}.values'"
    if indices_K.dtype != index_dtype(shape):
        return f"{indices_name} has dtype {indices_K.dtype}, expected {index_dtype(shape)} for shape {list(shape)}"
    if values_K.dtype != torch.float32:
        return f"{values_name} has dtype {values_K.dtype}, expected torch.float32"
    if indices_K.dim() != 1 or indices_K.shape != values_K.shape:
        return (
            f"{indices_name} has shape {list(indices_K.shape)} and {values_name} has shape {list(values_K.shape)}, "
            "expected one and the same length"
        )
    if indices_K.numel() == 0:
        return None
    smallest, largest = int(indices_K.min()), int(indices_K.max())
    if smallest < 0 or largest >= numel:
        return (
            f"{indices_name} holds {smallest if smallest < 0 else largest}, expected 0 to {numel - 1} for shape "
            f"{list(shape)}"
        )
    steps = indices_K[1:] - indices_K[:-1]
    if bool((steps < 0).any()):
        position = int((steps < 0).nonzero()[0])
        return f"{indices_name} is not in ascending order at position {position + 1}"
    if bool((steps == 0).any()):
        return f"{indices_name} holds {int(indices_K[int((steps == 0).nonzero()[0])])} twice"
    if not bool(values_K.isfinite().all()):
        num_bad = int((~values_K.isfinite()).sum())
        return f"{values_name} holds {num_bad} numbers that are NaN or infinite"
    return None
