"""Builds the native operators, curveball_fused._C. Everything else stands in pyproject.toml.

The torch that is installed supplies headers and libraries, so install it first and build without isolation:

    pip install torch setuptools
    pip install --no-build-isolation .

CURVEBALL_NATIVE=0 builds without a compiler: a pure Python package, with the torch backend only.
"""

import glob
import importlib.util
import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

NATIVE = os.environ.get("CURVEBALL_NATIVE", "1") != "0"
WITHOUT = "Or set CURVEBALL_NATIVE=0 to build without native kernels (the torch backend only)."


def find_torch() -> Path:
    """The directory of the installed torch, found without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None:
        sys.exit(
            "curveball_fused: no torch found, and its headers are needed to build the native kernels.\n"
            "Install torch first, then this package with --no-build-isolation:\n"
            "    pip install 'torch>=2.11' setuptools\n"
            f"    pip install --no-build-isolation .\n{WITHOUT}"
        )
    torch = Path(spec.origin).parent
    if not (torch / "include/torch/csrc/stable/ops.h").exists():
        sys.exit(f"curveball_fused: the torch in {torch} is too old, 2.11 or later is needed. {WITHOUT}")
    return torch


class BuildNative(build_ext):
    """Points the compiler at torch, only when something is really built; a failure never goes unnoticed."""

    def build_extension(self, ext):
        torch = find_torch()
        # isystem: no warnings from torch's headers. file-prefix-map: no path of this machine in the binary.
        ext.extra_compile_args += ["-isystem", f"{torch}/include", f"-ffile-prefix-map={torch}=torch"]
        ext.library_dirs.append(f"{torch}/lib")
        try:
            super().build_extension(ext)
        except (CompileError, LinkError) as error:
            hint = f"curveball_fused: the native kernels did not compile, see above. {WITHOUT}"
            raise type(error)(f"{error}\n{hint}") from error


native = Extension(
    "curveball_fused._C",
    sources=sorted(glob.glob("csrc/*.cpp") + glob.glob("csrc/cpu/*.cpp")),
    depends=["setup.py", *sorted(glob.glob("csrc/**/*.h", recursive=True))],
    define_macros=[("TORCH_TARGET_VERSION", "0x020b000000000000ULL"), ("Py_LIMITED_API", "0x030a0000")],
    py_limited_api=True,
    language="c++",
    # No fused multiply-add, no -ffast-math: the same bits from every instruction set.
    extra_compile_args=[
        "-std=c++17",
        "-O3",
        "-g0",
        "-Wall",
        "-Wextra",
        "-Wno-psabi",
        "-fvisibility=hidden",
        "-ffp-contract=off",
        "-fno-math-errno",
    ],
    # Resolved by the torch that is imported first: no rpath to the one of the build.
    libraries=["torch_cpu", "c10"],
)

if not NATIVE:
    print("curveball_fused: building WITHOUT native kernels (CURVEBALL_NATIVE=0): only the torch backend.")

setup(
    ext_modules=[native] if NATIVE else [],
    cmdclass={"build_ext": BuildNative},
    options={"bdist_wheel": {"py_limited_api": "cp310"}} if NATIVE else {},
)
