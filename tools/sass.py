"""Read machine code (SASS): what kernels take of a processor, and what is in their loops.

cuobjdump, and nvdisasm that it calls, come with the CUDA toolkit, or from PyPI: nvidia-cuda-cuobjdump,
nvidia-cuda-nvdisasm.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

TOOLS = ("cuobjdump", "nvdisasm")


class Usage(NamedTuple):
    """What a kernel takes: registers and bytes of each thread, and bytes of shared memory."""

    registers: int
    stack: int
    shared: int
    local: int


class Instruction(NamedTuple):
    address: int
    text: str


def search_path() -> str:
    """Return where the tools are looked for: Python's packages, PATH, and where the toolkit usually is."""
    packages = sorted(map(str, Path(sysconfig.get_path("purelib"), "nvidia").glob("cu*/bin")), reverse=True)
    toolkit = f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin"
    return os.pathsep.join([*packages, os.environ.get("PATH", ""), toolkit])


def missing_tools() -> str:
    """Return what is not there and how to get it, or an empty string."""
    missing = [tool for tool in TOOLS if shutil.which(tool, path=search_path()) is None]
    return f"needs {' and '.join(missing)}: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm" if missing else ""


def dump(path: Path, *options: str) -> str:
    """Return what cuobjdump prints of a library or a cubin; stop with its words if it fails."""
    if missing := missing_tools():
        sys.exit(missing)
    command = [str(shutil.which("cuobjdump", path=search_path())), *options, str(path)]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PATH": search_path()})
    if result.returncode:
        sys.exit(f"{' '.join(command)} failed:\n{result.stderr}")
    return result.stdout


def dotted(architecture: str) -> str:
    """Return "90" or "90a" as "9.0"."""
    digits = architecture.rstrip("af")
    return f"{digits[:-1]}.{digits[-1]}"


def usages(path: Path, architecture: str = "") -> Iterator[tuple[str, str, Usage]]:
    """Yield the name, the architecture and the usage of each kernel; a cubin does not tell its architecture."""
    pattern = re.compile(r"arch = sm_(\w+)|Function (\S+):\s+REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")
    for match in pattern.finditer(dump(path, "-res-usage")):
        if match[1]:
            architecture = dotted(match[1])
        else:
            yield match[2], architecture, Usage(*map(int, match.groups()[2:]))


def codes(path: Path) -> Iterator[tuple[str, str, list[Instruction]]]:
    """Yield the name, the architecture and the instructions of each kernel."""
    for section in dump(path, "-sass").split("code for sm_")[1:]:
        architecture = dotted(re.match(r"\w+", section)[0])
        for function in section.split("Function : ")[1:]:
            name, text = function.split(maxsplit=1)
            instructions = re.findall(r"/\*([0-9a-f]{4,})\*/\s+([^;]+);", text)
            yield name, architecture, [Instruction(int(address, 16), code) for address, code in instructions]


def loops(code: Sequence[Instruction], innermost: bool = False) -> list[list[Instruction]]:
    """Return the instructions of each loop, from the target of a branch backward to the branch.

    Args:
        code: The instructions of one kernel.
        innermost: Leave out loops that have another one within.
    """
    ends = [(re.search(r"\bBRA\b.*\b0x([0-9a-f]+)", text), address) for address, text in code]
    found = [(start, end) for branch, end in ends if branch and (start := int(branch[1], 16)) < end]
    if innermost:
        found = [
            (start, end)
            for start, end in found
            if not any(start <= a and b <= end and (a, b) != (start, end) for a, b in found)
        ]
    return [[instruction for instruction in code if start <= instruction.address < end] for start, end in found]
