"""Check in the machine code of the CUDA library what makes the kernels fast; print the figures as a table.

    python tools/check_machine_code.py curveball_fused/_C_cuda.abi3.so

A kernel of the memory's speed keeps all it works on in registers (no stack, no local memory), few enough of them that
many threads are resident, and moves 128 bits or more at a time in its loops.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import sass

DEFAULT_ARCHITECTURES = "8.0;9.0;10.0;12.0+PTX"  # as in setup.py

# What each family of kernels must fulfill; the first pattern that matches counts. With 64 registers 1024 threads can be
# resident on a multiprocessor. The loss kernels compute more for each element and keep more vectors under way in each
# thread, so they get by with half as many threads; cross-entropy, a long row of which fills a multiprocessor's shared
# memory, with one block of 384. Wide accesses: at least so many in one loop.
#     pattern of the name              registers  wide loads  wide stores
RULES = (
    (r"^update_kernel",                       64,          3,           2),  # reads r, z, w; writes z, w
    (r"^dots_kernel",                         64,          2,           0),  # reads z, r
    (r"^precondition_kernel<float",           64,          3,           2),  # reads v, r, z; writes u, v
    (r"^precondition_kernel<double",         128,          2,           2),  # r may be of 16 bits
    (r"^cross_entropy_cotangent",            168,          2,           1),  # reads x, v; writes c
    (r"^cross_entropy_products",             168,          3,           0),  # reads x, v, u
    (r"^element_cotangent",                  128,          2,           1),
    (r"^element_products",                   128,          3,           0),
    (r"",                                    128,          0,           0),  # one block: sums of sums, the 2x2 solve
)  # fmt: skip

# Accesses of 128 bits or more to global memory.
WIDE_LOAD, WIDE_STORE = r"\bLDG\.E\.[\w.]*(128|256)", r"\bSTG\.E\.[\w.]*(128|256)"


@dataclass
class Code:
    """One kernel on one architecture."""

    registers: int = 0
    stack: int = 0
    local: int = 0
    shared: int = 0
    loads: int = 0  # wide ones, the most in one loop
    stores: int = 0


@dataclass
class Library:
    """What the library holds: code by kernel and architecture, such as "9.0", and the architectures of its PTX."""

    kernels: dict[str, dict[str, Code]] = field(default_factory=dict)
    ptx: set[str] = field(default_factory=set)

    @property
    def architectures(self) -> list[str]:
        return sorted({architecture for codes in self.kernels.values() for architecture in codes}, key=float)


def read_library(path: Path, architecture: str = "") -> Library:
    """Read a library, or a cubin: that does not tell its architecture."""
    library = Library()
    for name, its_architecture, usage in sass.usages(path, architecture):
        code = Code(usage.registers, usage.stack, usage.local, usage.shared)
        library.kernels.setdefault(name, {})[its_architecture] = code
    for name, its_architecture, instructions in sass.codes(path):
        code = library.kernels[name][its_architecture]
        code.loads, code.stores = wide_accesses_in_loops(instructions)
    library.ptx = {sass.dotted(name) for name in re.findall(r"\.sm_(\w+)\.ptx", sass.dump(path, "-lptx"))}
    return library


def wide_accesses_in_loops(code: Sequence[sass.Instruction]) -> tuple[int, int]:
    """Return the most wide loads, and the most wide stores, in one loop."""
    found = sass.loops(code)
    loads, stores = (
        max((sum(bool(re.search(pattern, text)) for _, text in loop) for loop in found), default=0)
        for pattern in (WIDE_LOAD, WIDE_STORE)
    )
    return loads, stores


def demangled(names: Iterable[str]) -> list[str]:
    """Return kernels' names as in C++, without parameters: "curveball::cuda::dots_kernel<float, float, 512>"."""
    output = subprocess.run(["c++filt", "-p"], input="\n".join(names), capture_output=True, text=True, check=True)
    return [line.removeprefix("void ") for line in output.stdout.splitlines()]


def readable(kernels: dict[str, dict[str, Code]]) -> dict[str, dict[str, Code]]:
    """Return the same kernels under shorter names: "dots_kernel<float, float, 512>"."""
    names = [re.sub(r"\bcurveball::(cuda::)?", "", name) for name in demangled(kernels)]
    return dict(zip(names, kernels.values(), strict=True))


ADVICE = {
    "stack": "an array is indexed by what is not known when compiling, or registers are spilled: unroll, or take fewer "
    "elements at a time",
    "local": "as for the stack",
    "registers": "take fewer elements at a time, or set __launch_bounds__",
    "loads": "access whole 16-byte vectors through pointers that the compiler knows to be aligned and global",
    "stores": "as for the loads",
}


def figures(codes: dict[str, Code], column: str) -> str:
    """Return one number where all architectures agree, else one for each."""
    values = [getattr(codes[architecture], column) for architecture in sorted(codes, key=float)]
    return str(values[0]) if len(set(values)) == 1 else "/".join(map(str, values))


def violations(kernels: dict[str, dict[str, Code]]) -> list[str]:
    """Return which kernels, by readable name, break which rule, and what to do."""
    found = []
    broken = set()
    for name, codes in sorted(kernels.items()):
        _, registers, loads, stores = next(rule for rule in RULES if re.search(rule[0], name))
        most = {"stack": 0, "local": 0, "registers": registers}
        least = {"loads": loads, "stores": stores}
        for column in ADVICE:
            values = [getattr(code, column) for code in codes.values()]
            if max(values) > most.get(column, max(values)) or min(values) < least.get(column, min(values)):
                bound = f"at most {most[column]}" if column in most else f"at least {least[column]}"
                found.append(f"{name}: {column} {figures(codes, column)}, must be {bound}")
                broken.add(column)
    found += [f"{column}: {advice}" for column, advice in ADVICE.items() if column in broken]
    unused = [pattern for pattern, *_ in RULES if not any(re.search(pattern, name) for name in kernels)]
    return found + [f'no kernel matches the rule "{pattern}": correct the table of rules' for pattern in unused]


def print_table(kernels: dict[str, dict[str, Code]], architectures: list[str]) -> None:
    print(f"| kernel, on {' / '.join(architectures)} | registers | shared bytes | wide loads | wide stores |")
    print("|---|---|---|---|---|")
    for name, codes in sorted(kernels.items()):
        row = " | ".join(figures(codes, column) for column in ("registers", "shared", "loads", "stores"))
        print(f"| `{name}` | {row} |")


def check_architectures(library: Library, wanted: str) -> list[str]:
    """Return what is missing of an architecture list such as "8.0;9.0+PTX"."""
    found = []
    for architecture in re.split(r"[;,\s]+", wanted.strip()):
        number = architecture.removesuffix("+PTX").rstrip("af")
        missing = [name for name, codes in library.kernels.items() if number not in codes]
        if missing or not library.kernels:
            found.append(
                f"no machine code for {number} of {len(missing)} kernels: build with TORCH_CUDA_ARCH_LIST={wanted}"
            )
        if architecture.endswith("+PTX") and number not in library.ptx:
            found.append(f"no PTX for {number}, which newer processors need: build with TORCH_CUDA_ARCH_LIST={wanted}")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("library", type=Path, help="_C_cuda.abi3.so")
    parser.add_argument(
        "--architectures",
        default=os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHITECTURES,
        help="that must be inside (default: TORCH_CUDA_ARCH_LIST, else %(default)s)",
    )
    arguments = parser.parse_args()
    library = read_library(arguments.library)
    kernels = readable(library.kernels)
    print_table(kernels, library.architectures)
    found = check_architectures(library, arguments.architectures) + violations(kernels)
    if found:
        sys.exit("\n".join(["", *found]))
    print(f"{arguments.library.name}: {len(library.kernels)} kernels on {', '.join(library.architectures)}: good")


if __name__ == "__main__":
    main()
