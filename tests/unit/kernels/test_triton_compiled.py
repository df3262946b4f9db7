"""The Triton kernels, compiled for sm_80 (A100) and sm_90 (H100, H200) as the functions launch them; no GPU is needed.

Nothing may spill, shared memory must fit, and the code must be what makes the kernels fast: tensor cores for 16-bit
products, asynchronous 16-byte copies, wide stores. Nothing may be atomic: every run gives the same bits.
"""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor
from triton_compiler import Compiled, CompilingLauncher

from sparse_ds.kernels.nf4 import quantize_nf4
from sparse_ds.kernels.triton_kernels import block_gradient, dequantize, put_deltas

CAPABILITIES = [80, 90]
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
"""Of one program at most (CUDA C++ Programming Guide, technical specifications per compute capability)."""
SIXTEEN_BYTES = re.compile(r"cp\.async\.cg\.shared\.global \[[^\]]*\], \[[^\]]*\], (?:0x10|16)\b")


def empty(*shape: int, dtype: torch.dtype) -> Tensor:
    """Only a shape: what is compiled for matrices of 7B models needs none of their memory."""
    return torch.empty(shape, dtype=dtype, device="meta")


def check(compiled: Compiled, capability: int) -> None:
    assert compiled.stack_bytes == 0, f"{compiled.registers} registers and {compiled.stack_bytes} bytes of stack"
    assert compiled.shared_bytes <= SHARED_BYTES[capability]
    assert not re.search(r"\b(atom|red)\.", compiled.ptx)


def check_gradient(compiled: Compiled, capability: int, dtype: torch.dtype) -> None:
    check(compiled, capability)
    assert SIXTEEN_BYTES.search(compiled.ptx), "operands are not copied asynchronously, 16 bytes at a time"
    if dtype != torch.float32:
        assert ("wgmma.mma_async" if capability >= 90 else "mma.sync") in compiled.ptx


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    ("dtype", "tokens", "rows", "cols", "count"),
    [
        (torch.bfloat16, 2048, 4096, 4096, 16777),
        (torch.bfloat16, 8192, 11008, 4096, 270000),
        (torch.bfloat16, 517, 4096, 4096, 16777),  # a number of tokens that no tile divides
        (torch.float16, 2048, 1024, 4096, 4194),
        (torch.float32, 2048, 4096, 4096, 16777),
        (torch.float32, 2048, 4096, 4096, 200000),
    ],
)
def test_gradient_of_single_weights(
    monkeypatch: pytest.MonkeyPatch,
    capability: int,
    dtype: torch.dtype,
    tokens: int,
    rows: int,
    cols: int,
    count: int,
) -> None:
    launcher = CompilingLauncher(block_gradient.gradient_kernel, capability)
    monkeypatch.setattr(block_gradient, "gradient_kernel", launcher)
    grad_output, input_IT = empty(tokens, rows, dtype=dtype), empty(cols, tokens, dtype=dtype)
    result = block_gradient.sampled_gradient(grad_output, input_IT, empty(count, dtype=torch.int32))
    assert result.shape == (count,)
    check_gradient(launcher.compiled[0], capability, dtype)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize(
    ("dtype", "block", "count"),
    [
        (torch.bfloat16, (16, 16), 1507),
        (torch.bfloat16, (1, 16), 24117),
        (torch.bfloat16, (64, 64), 94),
        (torch.float32, (16, 16), 1507),
        (torch.float32, (64, 64), 94),
    ],
)
def test_gradient_of_blocks(
    monkeypatch: pytest.MonkeyPatch, capability: int, dtype: torch.dtype, block: tuple[int, int], count: int
) -> None:
    launcher = CompilingLauncher(block_gradient.gradient_kernel, capability)
    monkeypatch.setattr(block_gradient, "gradient_kernel", launcher)
    operands = empty(2048, 4096, dtype=dtype), empty(2048, 4096, dtype=dtype)
    result = block_gradient.block_values_gradient(*operands, empty(count, dtype=torch.int32), *block)
    assert result.shape == (count * block[0] * block[1],)
    check_gradient(launcher.compiled[0], capability, dtype)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("block", [(1, 1), (16, 16)])
def test_deltas_in_and_out(monkeypatch: pytest.MonkeyPatch, capability: int, block: tuple[int, int]) -> None:
    launchers = [CompilingLauncher(k, capability) for k in (put_deltas.put_kernel, put_deltas.put_back_kernel)]
    monkeypatch.setattr(put_deltas, "put_kernel", launchers[0])
    monkeypatch.setattr(put_deltas, "put_back_kernel", launchers[1])
    weight, indices = empty(4096, 4096, dtype=torch.bfloat16), empty(16384, dtype=torch.int32)
    values = empty(16384 * block[0] * block[1], dtype=torch.float32)
    saved = put_deltas.put_deltas_(weight, indices, values, *block)
    put_deltas.put_back_(weight, indices, saved, *block)
    for launcher in launchers:
        check(launcher.compiled[0], capability)


@pytest.mark.parametrize("capability", CAPABILITIES)
@pytest.mark.parametrize("double_quantization", [False, True])
def test_nf4_with_deltas(monkeypatch: pytest.MonkeyPatch, capability: int, double_quantization: bool) -> None:
    launcher = CompilingLauncher(dequantize.dequantize_kernel, capability)
    monkeypatch.setattr(dequantize, "dequantize_kernel", launcher)
    stored = quantize_nf4(torch.randn(64, 256).bfloat16(), double_quantization=double_quantization)
    dequantize.dequantize_with_deltas(
        stored.packed,
        stored.absmax,
        stored.nested_statistics,
        torch.arange(64, dtype=torch.int32),
        torch.zeros(64),
        shape=(64, 256),
        dtype=torch.bfloat16,
        begins=None,
    )
    (compiled,) = launcher.compiled
    check(compiled, capability)
    # Whole 16-byte stores; then a barrier, and only then the deltas, one weight each.
    wide, barrier, narrow = (compiled.ptx.rindex(x) for x in ("st.global.v4.b32", "bar.sync", "st.global.b16"))
    assert wide < barrier < narrow
    assert "fma.rn.f32" not in compiled.ptx, "the product and the sum are to be rounded one by one"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_sizes_of_one(monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype) -> None:
    """triton makes constants of arguments that are 1; and 64-bit indices."""
    launchers = {}
    for module, name in [
        (block_gradient, "gradient_kernel"),
        (put_deltas, "put_kernel"),
        (put_deltas, "put_back_kernel"),
        (dequantize, "dequantize_kernel"),
    ]:
        launchers[name] = CompilingLauncher(getattr(module, name), 90)
        monkeypatch.setattr(module, name, launchers[name])
    one, index = torch.zeros(1, 1, dtype=dtype), torch.zeros(1, dtype=torch.int64)
    block_gradient.sampled_gradient(one, one, index)
    block_gradient.sampled_gradient(torch.zeros(5, 1, dtype=dtype), torch.zeros(3, 5, dtype=dtype), index)
    block_gradient.block_values_gradient(torch.zeros(1, 2, dtype=dtype), torch.zeros(1, 8, dtype=dtype), index, 2, 8)
    saved = put_deltas.put_deltas_(one, index, torch.zeros(1), 1, 1)
    put_deltas.put_back_(one, index, saved, 1, 1)
    for double_quantization in (False, True):
        stored = quantize_nf4(one, double_quantization=double_quantization)
        tensors = stored.packed, stored.absmax, stored.nested_statistics
        for count in (0, 1):
            dequantize.dequantize_with_deltas(
                *tensors, index[:count], torch.zeros(count), shape=(1, 1), dtype=dtype, begins=None
            )
    assert [len(launcher.compiled) for launcher in launchers.values()] == [3, 1, 1, 4]
