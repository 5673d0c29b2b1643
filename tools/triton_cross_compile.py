"""Compile the Triton kernels for several GPU architectures, without a GPU, and report what is in the machine code.

python tools/triton_cross_compile.py [80 90 100 120]
"""

from __future__ import annotations

import os
import re
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import sass
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton_signatures import Kernel, kernels

ARCHITECTURES = (80, 90, 100, 120)
# Triton's own tools know what its assembler writes.
TRITON_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
os.environ["PATH"] = os.pathsep.join([str(TRITON_TOOLS), os.environ.get("PATH", "")])


class Figures(NamedTuple):
    """What the machine code shows.

    `local` counts accesses to local memory, wide_loads and wide_stores those of 128 bits inside the hot loops, `narrow`
    all others there, to local memory as well.
    """

    registers: int
    stack: int
    local: int
    wide_loads: int
    wide_stores: int
    narrow: int


def compile_for(kernel: Kernel, architecture: int) -> bytes:
    """Return the machine code, pointers and strides aligned as the launcher finds those of whole tensors."""
    signature: dict[str, Any] = {}
    constants: dict[Any, Any] = {}
    aligned = {}
    for i, name in enumerate(kernel.function.arg_names):
        kind = kernel.types.get(name, "constexpr")
        signature[name] = kind
        if isinstance(kind, tuple):
            signature[name] = tuple("constexpr" if each == "1" else each for each in kind)
            constants |= {(i, j): 1 for j, each in enumerate(kind) if each == "1"}
            aligned |= {(i, j): [["tt.divisibility", 16]] for j, each in enumerate(kind) if each != "1"}
        elif kind == "constexpr":
            constants[name] = kernel.constants.get(name)
        elif kind.startswith("*"):
            aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel.function, signature=signature, constexprs=constants, attrs=aligned)
    options = dict(num_warps=kernel.warps, num_stages=kernel.stages, enable_fp_fusion=kernel.fused)
    return triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options).asm["cubin"]


def figures_of(cubin: bytes, straight: bool) -> Figures:
    """Read the machine code; if that is `straight`, all of it is hot, though not every access need be wide."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        ((_, _, usage),) = sass.usages(Path(file.name))
        ((_, _, code),) = sass.codes(Path(file.name))
    hot = [accesses(loop) for loop in sass.loops(code, innermost=True)]
    hot = [loop for loop in hot if any("LDG" in access and ".128" in access for access in loop)]
    if straight:
        hot = [accesses(code)]
    wide = [access for loop in hot for access in loop if ".128" in access]
    return Figures(
        registers=usage.registers,
        stack=usage.stack,
        local=sum(access.startswith(("LDL", "STL")) for access in accesses(code)),
        wide_loads=sum("LDG" in access for access in wide),
        wide_stores=sum(access.startswith("STG") for access in wide),
        narrow=0 if straight else sum(".128" not in access for loop in hot for access in loop),
    )


def accesses(code: Iterable[sass.Instruction]) -> list[str]:
    """Return the instructions that access global or local memory, without their operands."""
    return [match[0] for _, text in code if (match := re.search(r"\b(?:LDG|STG|LDGSTS|LDL|STL)\b[.\w]*", text))]


def report(architectures: Iterable[int]) -> dict[str, Figures]:
    """Compile everything, print a table, and return the figures by "kernel sm_XX"."""
    print(f"Triton {triton.__version__}; 128-bit loads and stores, and narrower ones, are those of the hot loops")
    header = f"{'kernel':<36}{'sm':>5}" + "".join(f"{name:>12}" for name in Figures._fields)
    print(header)
    result = {}
    for kernel in kernels():
        for architecture in architectures:
            figures = figures_of(compile_for(kernel, architecture), kernel.straight)
            print(f"{kernel.name:<36}{architecture:>5}" + "".join(f"{figure:>12}" for figure in figures))
            result[f"{kernel.name} sm_{architecture}"] = figures
    return result


def failures(kernel: Kernel, figures: Figures) -> list[str]:
    """Return what is wrong with the machine code: no stack, no spills, and in the hot loops vectors only."""
    found = []
    if figures.stack > (32 if kernel.may_spill else 0):
        found.append(f"a stack of {figures.stack} bytes")
    if figures.local and not kernel.may_spill:
        found.append(f"{figures.local} accesses to local memory")
    if figures.narrow:
        found.append(f"{figures.narrow} accesses of less than 128 bits, or to local memory, in the hot loops")
    if figures.wide_loads < kernel.vectors[0] or figures.wide_stores < kernel.vectors[1]:
        found.append(f"128-bit accesses {figures.wide_loads, figures.wide_stores} where {kernel.vectors} are needed")
    if figures.registers > kernel.registers:
        found.append(f"{figures.registers} registers of at most {kernel.registers}")
    return found


def main() -> None:
    if missing := sass.missing_tools():
        sys.exit(missing)
    architectures = [int(argument) for argument in sys.argv[1:]] or ARCHITECTURES
    figures = report(architectures)
    wrong = [
        f"{kernel.name} sm_{architecture}: {', '.join(found)}"
        for kernel in kernels()
        for architecture in architectures
        if (found := failures(kernel, figures[f"{kernel.name} sm_{architecture}"]))
    ]
    sys.exit("\n".join(wrong) or None)


if __name__ == "__main__":
    main()
