"""Compile what a launch of a Triton kernel would run, for a GPU that need not be there."""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
    torch.int32: "i32",
    torch.int64: "i64",
    torch.uint8: "u8",
}


@dataclass(frozen=True)
class Compiled:
    """What the compiler made: registers and stack (where it spills to) per thread, shared memory per program."""

    registers: int
    stack_bytes: int
    shared_bytes: int
    ptx: str


class CompilingLauncher:
    """Stands where a kernel stands: a launch compiles it for its arguments as triton would, and runs nothing."""

    def __init__(self, kernel: Any, capability: int) -> None:
        self.kernel = kernel
        self.target = GPUTarget("cuda", capability, 32)
        self.compiled: list[Compiled] = []

    def __getitem__(self, grid: tuple[int, ...]) -> CompilingLauncher:
        assert all(0 < size < 2**31 for size in grid) and all(size < 2**16 for size in grid[1:])
        return self

    def __call__(self, *arguments: Any, **options: Any) -> None:
        names = self.kernel.arg_names
        constants = {name: options.pop(name) for name in names if name in options}
        signature, attributes = dict.fromkeys(constants, "constexpr"), {}
        for position, (name, argument) in enumerate(zip(names, arguments, strict=False)):
            if isinstance(argument, torch.Tensor):
                signature[name] = "*" + TYPES[argument.dtype]
                divisible = argument.data_ptr() % 16 == 0
            elif argument == 1:
                signature[name], constants[name], divisible = "constexpr", 1, False
            else:
                signature[name], divisible = "i64" if argument >= 2**31 else "i32", argument % 16 == 0
            if divisible:
                attributes[(position,)] = [["tt.divisibility", 16]]
        signature = {name: signature[name] for name in names}
        source = ASTSource(self.kernel, signature, constants, attributes)
        result = triton.compile(source, target=self.target, options=options)
        self.compiled.append(
            Compiled(*resource_usage(result.asm["cubin"]), result.metadata.shared, result.asm["ptx"]),
        )


def resource_usage(cubin: bytes) -> tuple[int, int]:
    """(registers, bytes of stack and local memory), each per thread."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    (line,) = [line for line in usage.splitlines() if "REG:" in line]
    found = {name: int(number) for name, number in re.findall(r"(REG|STACK|LOCAL):(\d+)", line)}
    return found["REG"], found["STACK"] + found["LOCAL"]
