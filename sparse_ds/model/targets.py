"""Which linear layers of a model get deltas."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

from torch import nn

from sparse_ds.config.errors import UserError

ALL_LINEAR = "all-linear"
_IN_BLOCK = re.compile(r"(^|\.)layers?\.\d+\.")
"""Decoders call their blocks `layers`, encoders `layer`."""
_IS_BLOCK = re.compile(r"(^|\.)layers?\.\d+$")


def find_targets(model: nn.Module, target_modules: Sequence[str] | str) -> list[str]:
    """Names of the linear layers inside the transformer blocks that match.

    Args:
        model: of transformers (weights may be on the meta device).
        target_modules: "all-linear", or names: each matches a whole module name or its last parts ("q_proj",
            "mlp.down_proj"), or is a regular expression that matches the whole name.

    Returns:
        Names in the order of the model. Embeddings and the head are never targets: they are no linear layers inside a
        block.

    Raises:
        UserError: a pattern matches no layer.
    """
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear) and is_in_block(name)]
    if target_modules == ALL_LINEAR:
        return linears
    patterns = [target_modules] if isinstance(target_modules, str) else list(target_modules)
    chosen: set[str] = set()
    for pattern in patterns:
        matched = [name for name in linears if name == pattern or name.endswith("." + pattern)]
        matched = matched or [name for name in linears if _matches_whole(pattern, name)]
        if not matched:
            last_parts = sorted({name.rsplit(".", 1)[-1] for name in linears})
            near = difflib.get_close_matches(pattern, last_parts, n=1)
            raise UserError(
                f"method.target_modules: {pattern!r} matches no linear layer of the model; expected one of "
                f"{', '.join(last_parts)}, a full module name, a regular expression of one, or {ALL_LINEAR!r}."
                + (f" Did you mean {near[0]!r}?" if near else "")
            )
        chosen.update(matched)
    return [name for name in linears if name in chosen]


def is_in_block(name: str) -> bool:
    """Whether a module is a part of a transformer block."""
    return _IN_BLOCK.search(name) is not None


def find_blocks(model: nn.Module) -> list[str]:
    """Names of the transformer blocks, in the order of the model."""
    return [name for name, _ in model.named_modules() if _IS_BLOCK.search(name)]


def find_norms(model: nn.Module) -> list[str]:
    """Names of the norms inside the transformer blocks and of the one behind them, in the order of the model.

    The norm of an encoder's embeddings is a part of the embeddings, which are frozen.
    """
    return [
        name
        for name, module in model.named_modules()
        if type(module).__name__.endswith("RMSNorm") or (isinstance(module, nn.LayerNorm) and is_in_block(name))
    ]


def _matches_whole(pattern: str, name: str) -> bool:
    try:
        return re.fullmatch(pattern, name) is not None
    except re.error:
        return False
