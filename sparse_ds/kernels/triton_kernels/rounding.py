"""Rounding as the hardware and torch do it, also in Triton's interpreter."""

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
from __future__ import annotations

import triton
import triton.language as tl
from triton import knobs

INTERPRETED: bool = knobs.runtime.interpret
"""Kernels run in Triton's interpreter (TRITON_INTERPRET=1 when triton was imported)."""


@triton.jit
def rounded(x, dtype: tl.constexpr, INTERPRETED: tl.constexpr):
    """fp32 to `dtype`, to the nearest and ties to even."""
    if INTERPRETED and dtype == tl.bfloat16:
        # The interpreter's own conversion to bf16 cuts off the last 16 bits.
        bits = x.to(tl.uint32, bitcast=True)
        bits = bits + 0x7FFF + ((bits >> 16) & 1)
        result = (bits >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        result = x.to(dtype)
    return result
