"""Compiles the Triton kernels for several GPU architectures, without a GPU, and reports what is in the machine code.

python tools/triton_cross_compile.py [80 90 100 120]
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton_signatures import Kernel, kernels

ARCHITECTURES = (80, 90, 100, 120)


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
    """The machine code of `kernel`, pointers and strides aligned as the launcher finds those of whole tensors."""
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


@cache
def disassembler(name: str) -> str | None:
    """Where cuobjdump or nvdisasm is: in Triton's package, in those of the toolkit on PyPI, or on the path."""
    folders = [Path(triton.__file__).parent / "backends" / "nvidia" / "bin"]
    folders += [bin for path in sys.path for bin in Path(path).glob("nvidia/*/bin")]
    return next((str(folder / name) for folder in folders if (folder / name).is_file()), shutil.which(name))


def missing_tools() -> str:
    """What is needed to read machine code and not there, or an empty string."""
    missing = [name for name in ("cuobjdump", "nvdisasm") if disassembler(name) is None]
    return f"needs {' and '.join(missing)}: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm" if missing else ""


def figures_of(cubin: bytes, straight: bool) -> Figures:
    """Reads the machine code; if that is `straight`, all of it is hot, though not every access need be wide."""
    dump, disassemble = disassembler("cuobjdump"), disassembler("nvdisasm")
    assert dump is not None and disassemble is not None, missing_tools()
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage = subprocess.run([dump, "-res-usage", file.name], check=True, capture_output=True, text=True)
        code = subprocess.run([disassemble, "-c", file.name], check=True, capture_output=True, text=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage.stdout + usage.stderr).groups()
    lines = code.splitlines()
    hot = [accesses for accesses in _loops(lines) if any("LDG" in access and ".128" in access for access in accesses)]
    if straight:
        hot = [_accesses(lines)]
    wide = [access for accesses in hot for access in accesses if ".128" in access]
    return Figures(
        registers=int(registers),
        stack=int(stack),
        local=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        wide_loads=sum("LDG" in access for access in wide),
        wide_stores=sum(access.startswith("STG") for access in wide),
        narrow=0 if straight else sum(".128" not in access for accesses in hot for access in accesses),
    )


def _loops(lines: list[str]) -> list[list[str]]:
    """The accesses to memory in each innermost loop: a branch back to a label with no other such loop between."""
    labels = {match[1]: i for i, line in enumerate(lines) if (match := re.match(r"(\.L_\w+):", line.strip()))}
    back = []
    for i, line in enumerate(lines):
        match = re.search(r"\bBRA\b.*?`\((\.L_\w+)\)", line)
        if match and labels.get(match[1], i) < i:
            back.append((labels[match[1]], i))
    inner = [(a, b) for a, b in back if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in back)]
    return [_accesses(lines[a:b]) for a, b in inner]


def _accesses(lines: list[str]) -> list[str]:
    return re.findall(r"\b(?:LDG|STG|LDGSTS|LDL|STL)\b[.\w]*", "\n".join(lines))


def report(architectures: Iterable[int]) -> dict[str, Figures]:
    """Compiles everything, prints a table, and returns the figures by "kernel sm_XX"."""
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
    """What is wrong with the machine code of `kernel`: no stack, no spills, and in the hot loops vectors only."""
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
    if missing_tools():
        sys.exit(missing_tools())
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
