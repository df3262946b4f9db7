"""How running means are stored in 16 or 8 bits: rounded stochastically, by random bits that depend on nothing else.

The random bits are a hash of (step, flat tensor, position in it): the same on every device, however the work is cut,
and after a resume. Why rounding to nearest would not do, and what the codes are: `sparse_adamw`.
"""

from __future__ import annotations

import math
from functools import lru_cache

import bitsandbytes.functional as bnb
import torch
from torch import Tensor
from torch.nn.functional import pad

BLOCK_ELEMENTS = 256
"""Values that share one fp32 maximum; the block size of bitsandbytes' 8-bit optimizers."""
TO_NEAREST = 1 << 15
"""As `noise` of `round_bfloat16` and `quantize`: half of the 16 bits, which rounds to nearest."""


def blocks_of(chunk: slice) -> slice:
    """Which blocks the elements of a chunk lie in; the chunk begins with a block."""
    return slice(chunk.start // BLOCK_ELEMENTS, math.ceil(chunk.stop / BLOCK_ELEMENTS))


@lru_cache(maxsize=8)
def dynamic_map(signed: bool, device: torch.device) -> Tensor:
    """[256] fp32, ascending: the code values of bitsandbytes, but from -1 instead of -0.993 on if signed."""
    code: Tensor = bnb.create_dynamic_map(signed=signed).clone()
    if signed:
        code[0] = -1.0
    return code.to(device)


def quantize(moment: Tensor, signed: bool, noise: Tensor | int) -> tuple[Tensor, Tensor]:
    """Blockwise 8-bit codes of a moment.

    Args:
        moment: [n] fp32.
        signed: which map; without, the moment is >= 0 and stays > 0 where it is.
        noise: [n] int32 uniform in 0 .. 2^16 - 1 rounds stochastically, `TO_NEAREST` to nearest.

    Returns:
        [n] uint8 codes and [ceil(n / 256)] fp32 maxima of the blocks.
    """
    num_elements, code = moment.numel(), dynamic_map(signed, moment.device)
    blocks = pad(moment, (0, -num_elements % BLOCK_ELEMENTS)).view(-1, BLOCK_ELEMENTS)
    absmax = blocks.abs().amax(1)
    scaled = blocks.div(absmax.masked_fill(absmax == 0, 1.0)[:, None]).view(-1)[:num_elements]
    upper = torch.bucketize(scaled, code, out_int32=True).clamp_(1, 255)
    lower = upper - 1
    below, above = code.index_select(0, lower), code.index_select(0, upper)
    fraction = scaled.sub_(below).div_(above.sub_(below))
    codes = lower.add_(fraction.mul_(1 << 16) > noise + 0.5)
    if not signed:
        codes = torch.where(moment > 0, codes.clamp(min=1), codes)
    return codes.to(torch.uint8), absmax


def round_bfloat16(moment: Tensor, noise: Tensor | int) -> Tensor:
    """[n] fp32 -> bf16: `noise` (int32 in 0 .. 2^16 - 1) is added to the 16 bits that are cut off."""
    rounded = moment.view(torch.int32).add(noise).bitwise_and_(-(1 << 16)).view(torch.float32)
    # A NaN must not overflow to a number.
    return torch.where(moment.isnan(), moment, rounded).bfloat16()


def random_bits(chunk: slice, step: int, number: int, device: torch.device) -> Tensor:
    """[n] int32, 32 random bits per element: a hash of step, number of the flat tensor and position in it.

    The hash is `lowbias32` of Wellons' hash-prospector (github.com/skeeto/hash-prospector), of position + key.
    """
    key = _lowbias32(_lowbias32(number) + step)
    start = (chunk.start + key) % (1 << 32)
    bits = torch.arange(chunk.stop - chunk.start, dtype=torch.int32, device=device)
    bits.add_(_as_int32(start))
    # `>>` keeps the sign, the masks cut it off.
    bits.bitwise_xor_((bits >> 16).bitwise_and_(0xFFFF)).mul_(0x7FEB352D)
    bits.bitwise_xor_((bits >> 15).bitwise_and_(0x1FFFF)).mul_(_as_int32(0x846CA68B))
    return bits.bitwise_xor_((bits >> 16).bitwise_and_(0xFFFF))


def _lowbias32(number: int) -> int:
    number %= 1 << 32
    number = (number ^ number >> 16) * 0x7FEB352D % (1 << 32)
    number = (number ^ number >> 15) * 0x846CA68B % (1 << 32)
    return number ^ number >> 16


def _as_int32(number: int) -> int:
    """The signed integer with the same 32 bits."""
    return number - (1 << 32) if number >= 1 << 31 else number
