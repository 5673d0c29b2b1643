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
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from curveball_fused import triton_cross_entropy, triton_kernels, triton_losses, triton_rows, triton_solve, triton_sums

ARCHITECTURES = (80, 90, 100, 120)
TYPES = {"fp16": tl.float16, "bf16": tl.bfloat16, "fp32": tl.float32, "fp64": tl.float64}


class Kernel(NamedTuple):
    """What to compile: types by parameter (others are None), and the launcher's options.

    `vectors` is how many 128-bit loads and stores a thread needs for all operands of the hot loops, if there are any.
    """

    name: str
    function: Any
    types: dict[str, str]
    constants: dict[str, Any]
    warps: int
    vectors: tuple[int, int] = (0, 0)

    @property
    def registers(self) -> int:
        """The bound. 80 lets a multiprocessor of 65536 registers run three programs of 8 warps at once, 128 two."""
        if self.name.startswith(("update_", "dots")):
            return 128 if "fp64" in self.name.split()[1] else 80
        return 144

    @property
    def fused(self) -> bool:
        """Whether the launcher allows fused multiply-add: where many elements are worked on."""
        return self.vectors != (0, 0) or "cross_entropy" in self.name


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


def kernels() -> list[Kernel]:
    """Every kernel, those over many elements in several dtypes."""
    scalar = dict(scalars="*fp64", new="*fp64")
    doubles = dict.fromkeys(("low", "high", "factor", "minimum", "maximum", "beta", "rho", "lr"), "fp64")
    found = [
        Kernel("solve", triton_solve.solve_kernel, scalar | doubles | dict(loss="*fp32", products="*fp64"),
               dict(BETA_FIXED=False, RHO_FIXED=False), 1),
        Kernel("adapt_damping", triton_solve.adapt_damping_kernel, scalar | doubles | dict(new_loss="*fp32"), {}, 1),
        Kernel("finish update_", triton_kernels.finish_update_kernel,
               scalar | dict(partials="*fp64", bounds="*i64", lr="*fp64", groups="i32"),
               dict(BLOCK=triton_sums.SUM_BLOCK), triton_kernels.WARPS),
        Kernel("finish dots", triton_kernels.finish_dots_kernel, dict(partials="*fp64", count="i32", result="*fp64"),
               dict(BLOCK=triton_sums.SUM_BLOCK), triton_kernels.WARPS),
        Kernel("finish loss", triton_sums.finish_kernel,
               dict(partials="*fp64", count="i32", divisor="*fp64", sign="fp64", loss="*fp64", result="*fp64"),
               dict(BLOCK=triton_sums.SUM_BLOCK), triton_sums.SUM_WARPS),
        Kernel("cross_entropy D", triton_rows.divisor_kernel,
               dict(target="*i64", divisors="*fp64", n="i64", classes="i32", ignore_index="i32"),
               dict(A=tl.float32, BLOCK=1024), 4),
    ]  # fmt: skip
    for dtypes in ("fp32 fp32 fp32", "bf16 fp32 bf16", "fp16 fp32 fp32", "fp64 fp64 fp64"):
        found.append(_update(*dtypes.split()))
    for dtypes in ("fp32 fp32", "fp32 bf16", "fp64 fp64"):
        found.append(_dots(*dtypes.split()))
    for x in ("bf16", "fp32"):
        for second in (False, True):
            found += [_loss(x, second, bce) for bce in (False, True)]
            found += [_cross_entropy(x, second, classes) for classes in (10, 50257)]
    return found


def _list_options() -> dict[str, Any]:
    names = ("CHUNK", "BODY", "TAIL")
    return {name: getattr(triton_kernels, name) for name in names}


def _vectors(block: int, warps: int, *dtypes: str) -> int:
    return sum(max(block // (32 * warps) * TYPES[dtype].primitive_bitwidth // 128, 1) for dtype in dtypes)


def _update(w: str, z: str, r: str) -> Kernel:
    types = dict(table="*i64", tensors="i32", scalars="*fp64", lr="*fp64", weight_decay="*fp64", partials="*fp64")
    constants = dict(W=TYPES[w], Z=TYPES[z], R=TYPES[r], **_list_options())
    body, warps = triton_kernels.BODY, triton_kernels.WARPS
    vectors = _vectors(body, warps, w, z, r), _vectors(body, warps, w, z)
    return Kernel(f"update_ {w} {z} {r}", triton_kernels.update_kernel, types, constants, warps, vectors)


def _dots(z: str, r: str) -> Kernel:
    types = dict(table="*i64", tensors="i32", partials="*fp64", slots="i32")
    constants = dict(Z=TYPES[z], R=TYPES[r], **_list_options())
    body, warps = triton_kernels.BODY, triton_kernels.WARPS
    return Kernel(
        f"dots {z} {r}", triton_kernels.dots_kernel, types, constants, warps, (_vectors(body, warps, z, r), 0)
    )


def _loss(x: str, second: bool, bce: bool) -> Kernel:
    operands = ("x", "v", "u", "y") if second else ("x", "v", "y")
    types = dict.fromkeys(operands, f"*{x}") | dict(partials="*fp64", divisor="*fp64", sign="fp64", n="i64")
    types |= {} if second else {"c": f"*{x}"}
    constants = dict(
        weights=1,
        pos_weights=1,
        BCE=bce,
        A=TYPES["fp64" if x == "fp64" else "fp32"],
        BODY=triton_losses.BODY,
        TAIL=triton_losses.TAIL,
        VECTOR=128 // TYPES[x].primitive_bitwidth,
    )
    name = f"{'bce' if bce else 'mse'}_{'dots' if second else 'products'} {x}"
    body, warps = triton_losses.BODY, triton_losses.WARPS
    vectors = _vectors(body, warps, *[x] * len(operands)), 0 if second else _vectors(body, warps, x)
    return Kernel(name, triton_losses.loss_kernel, types, constants, warps, vectors)


def _cross_entropy(x: str, second: bool, classes: int) -> Kernel:
    a = "fp64" if x == "fp64" else "fp32"
    types = dict(x=f"*{x}", v=f"*{x}", target="*i64", rows=f"*{a}", divisors="*fp64", divisor="*fp64", partials="*fp64")
    types |= dict(n="i64", classes="i32", ignore_index="i32", smoothing="fp64", sign="fp64")
    types |= dict(u=f"*{x}") if second else dict(c=f"*{x}")
    shape = triton_cross_entropy.shape_of(classes, TYPES[x].primitive_bitwidth // 8)
    warps = shape.pop("num_warps")
    function = triton_cross_entropy.dots_kernel if second else triton_cross_entropy.products_kernel
    name = f"cross_entropy_{'dots' if second else 'products'} {x} C={classes}"
    # The first sweep reads two operands, the second two or three.
    each = _vectors(shape["BODY"], warps, x) if shape["ROWS"] == 1 else 0
    vectors = (5 * each, 0) if second else (4 * each, each)
    return Kernel(name, function, types, dict(A=TYPES[a], SMOOTH=False, **shape), warps, vectors)


def compile_for(kernel: Kernel, architecture: int) -> bytes:
    """The machine code of `kernel`, pointers aligned to 16 bytes, as the launcher finds those of whole tensors."""
    names = kernel.function.arg_names
    constants = {name: kernel.constants.get(name) for name in names if name not in kernel.types}
    signature = {name: kernel.types.get(name, "constexpr") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    source = ASTSource(kernel.function, signature=signature, constexprs=constants, attrs=aligned)
    options = dict(num_warps=kernel.warps, enable_fp_fusion=kernel.fused)
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


def figures_of(cubin: bytes) -> Figures:
    """Reads the machine code."""
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
    wide = [access for accesses in hot for access in accesses if ".128" in access]
    return Figures(
        registers=int(registers),
        stack=int(stack),
        local=len(re.findall(r"\b(?:LDL|STL)\b", code)),
        wide_loads=sum("LDG" in access for access in wide),
        wide_stores=sum(access.startswith("STG") for access in wide),
        narrow=sum(".128" not in access for accesses in hot for access in accesses),
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
    return [re.findall(r"\b(?:LDG|STG|LDGSTS|LDL|STL)\b[.\w]*", "\n".join(lines[a:b])) for a, b in inner]


def report(architectures: Iterable[int]) -> dict[str, Figures]:
    """Compiles everything, prints a table, and returns the figures by "kernel sm_XX"."""
    print(f"Triton {triton.__version__}; 128-bit loads and stores, and narrower ones, are those of the hot loops")
    header = f"{'kernel':<36}{'sm':>5}" + "".join(f"{name:>12}" for name in Figures._fields)
    print(header)
    result = {}
    for kernel in kernels():
        for architecture in architectures:
            figures = figures_of(compile_for(kernel, architecture))
            print(f"{kernel.name:<36}{architecture:>5}" + "".join(f"{figure:>12}" for figure in figures))
            result[f"{kernel.name} sm_{architecture}"] = figures
    return result


def failures(kernel: Kernel, figures: Figures) -> list[str]:
    """What is wrong with the machine code of `kernel`: no stack, no spills, and in the hot loops vectors only.

    The losses may spill a few values, but outside the hot loops: ptxas does so to fit one more warp.
    """
    found = []
    is_loss = any(name in kernel.name for name in ("mse", "bce", "cross_entropy"))
    if figures.stack > (32 if is_loss else 0):
        found.append(f"a stack of {figures.stack} bytes")
    if figures.local and not is_loss:
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
