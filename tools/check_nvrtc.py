"""Compile the kernels with NVRTC of CUDA 12, and hold the machine code to the same rules as nvcc's.

    pip install nvidia-cuda-nvrtc-cu12==12.8.*
    python tools/check_nvrtc.py curveball_fused/_C_cuda.abi3.so

A machine has one nvcc, and wheels are built with several; NVRTC is the part of a CUDA toolkit that PyPI has for all of
them. The kernels to compile are those of the library given.
"""

from __future__ import annotations

import argparse
import ctypes
import os
import sys
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from check_machine_code import demangled, read_library, readable, violations
from sass import dotted

KERNELS = Path(__file__).resolve().parent.parent / "csrc/cuda"
ARCHITECTURES = ("80", "90", "100", "120")


class Nvrtc:
    """The few functions of libnvrtc that are needed."""

    def __init__(self) -> None:
        paths = sorted(Path(sysconfig.get_path("purelib"), "nvidia").glob("*/lib/libnvrtc.so.12"))
        if not paths:
            sys.exit("no NVRTC of CUDA 12 found: pip install 'nvidia-cuda-nvrtc-cu12==12.8.*'")
        self.library = ctypes.CDLL(str(paths[0]))
        major, minor = ctypes.c_int(), ctypes.c_int()
        self.call("nvrtcVersion", ctypes.byref(major), ctypes.byref(minor))
        self.version = f"{major.value}.{minor.value}"

    def call(self, function: str, *arguments: object) -> None:
        if code := getattr(self.library, function)(*arguments):
            raise RuntimeError(f"{function} returned {code}")

    def text(self, what: str, program: ctypes.c_void_p) -> bytes:
        """Return what nvrtcGet...Size and nvrtcGet... yield."""
        size = ctypes.c_size_t()
        self.call(f"nvrtcGet{what}Size", program, ctypes.byref(size))
        buffer = ctypes.create_string_buffer(size.value)
        self.call(f"nvrtcGet{what}", program, buffer)
        return buffer.raw

    def compile(self, source: str, kernels: list[str], architecture: str) -> bytes:
        """Return the cubin with kernels such as "curveball::cuda::dots_kernel<float>"; stop with NVRTC's words."""
        program = ctypes.c_void_p()
        self.call("nvrtcCreateProgram", ctypes.byref(program), source.encode(), b"kernels.cu", 0, None, None)
        for kernel in kernels:
            self.call("nvrtcAddNameExpression", program, kernel.encode())
        # Lambdas bear no __device__ in the kernels, and need none with nvcc.
        options = ["--std=c++17", "--device-as-default-execution-space", f"--include-path={KERNELS}"]
        options.append(f"--gpu-architecture=sm_{architecture}")
        pointers = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
        try:
            self.call("nvrtcCompileProgram", program, len(options), pointers)
        except RuntimeError:
            log = self.text("ProgramLog", program).decode()
            sys.exit(f"NVRTC {self.version} cannot compile the kernels for sm_{architecture}:\n{log}")
        cubin = self.text("CUBIN", program)
        self.call("nvrtcDestroyProgram", ctypes.byref(program))
        return cubin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("library", type=Path, help="_C_cuda.abi3.so")
    kernels = demangled(read_library(parser.parse_args().library).kernels)
    source = "".join(f'#include "{path.name}"\n' for path in sorted(KERNELS.glob("*.cuh")))
    nvrtc = Nvrtc()
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        cubins = list(pool.map(lambda architecture: nvrtc.compile(source, kernels, architecture), ARCHITECTURES))
    found = []
    for architecture, cubin in zip(ARCHITECTURES, cubins, strict=True):
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(cubin)
            file.flush()
            compiled = read_library(Path(file.name), dotted(architecture))
        if len(compiled.kernels) != len(kernels):
            found.append(f"sm_{architecture}: {len(compiled.kernels)} kernels, not {len(kernels)}")
        found += [f"sm_{architecture}: {violation}" for violation in violations(readable(compiled.kernels))]
    if found:
        sys.exit("\n".join(found))
    print(f"NVRTC {nvrtc.version}: {len(kernels)} kernels for sm_{', sm_'.join(ARCHITECTURES)}: good")


if __name__ == "__main__":
    main()
