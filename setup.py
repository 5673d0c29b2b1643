"""Build the native operators, curveball_fused._C and curveball_fused._C_cuda. The rest stands in pyproject.toml.

Written by hand, as torch.utils.cpp_extension cannot do three things: build without importing torch; build the CUDA
kernels beside a CPU-only torch, through a stub of libtorch_cuda; and link CUDA's runtime into the library, hidden, so
that it meets neither torch's nor the system's.

The torch that is installed supplies headers and libraries, so install it first and build without isolation:

    pip install torch setuptools
    pip install --no-build-isolation .

The CUDA library is built if that torch is a CUDA build and nvcc is found: in CUDA_HOME if that is set, else in
PATH or /usr/local/cuda. Environment variables:

    FORCE_CUDA=1                  build the CUDA library in any case, with a CPU-only torch too; 0 leaves it out
    TORCH_CUDA_ARCH_LIST          such as "8.0;9.0+PTX"; default: 8.0, 9.0, 10.0 and 12.0, as nvcc knows them, and PTX
    MAX_JOBS                      how many compilers run at once
    CURVEBALL_LOCAL_VERSION       such as cu130: the version becomes 0.1.0+cu130
    CURVEBALL_NATIVE=0            build without any compiler: a pure Python package, with the Triton and torch backends
"""

import email
import glob
import importlib.util
import json
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

try:
    from setuptools.command.bdist_wheel import bdist_wheel
except ImportError:  # setuptools before 70.1
    from wheel.bdist_wheel import bdist_wheel

NATIVE = os.environ.get("CURVEBALL_NATIVE", "1") != "0"
FORCE_CUDA = os.environ.get("FORCE_CUDA", "")
LOCAL_VERSION = os.environ.get("CURVEBALL_LOCAL_VERSION", "")
WITHOUT = "Or set CURVEBALL_NATIVE=0 to build without native kernels (a pure Python package)."
WITHOUT_CUDA = "Or set FORCE_CUDA=0 to build without the CUDA kernels."
DEFAULT_ARCHITECTURES = ("8.0", "9.0", "10.0", "12.0")

# The stable ABI of torch 2.11 and the limited API of Python 3.10: one binary for these and all later ones.
DEFINES = [("TORCH_TARGET_VERSION", "0x020b000000000000ULL"), ("Py_LIMITED_API", "0x030a0000")]
WARNINGS = ["-Wall", "-Wextra", "-Wno-psabi"]


def fail(message, way_out):
    sys.exit(f"curveball_fused: {message}\n{way_out}")


def find_torch() -> Path:
    """Return the directory of the installed torch, found without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None:
        fail(
            "no torch found, and its headers are needed to build the native kernels.\n"
            "Install torch first, then this package with --no-build-isolation:\n"
            "    pip install 'torch>=2.11' setuptools\n"
            "    pip install --no-build-isolation .",
            WITHOUT,
        )
    torch = Path(spec.origin).parent
    if not (torch / "include/torch/csrc/stable/ops.h").exists():
        fail(f"the torch in {torch} is too old, 2.11 or later is needed.", WITHOUT)
    return torch


def version_of_torch(torch: Path):
    """Return what torch/version.py defines, such as "__version__" and "cuda"."""
    return runpy.run_path(torch / "version.py")


def cuda_of_torch():
    """Return the CUDA release of the installed torch, such as "13.0"; None without torch or for a CPU build."""
    spec = importlib.util.find_spec("torch")
    return spec and version_of_torch(Path(spec.origin).parent)["cuda"]


# ------------------------------------------------------------------------------------------------ CUDA


def find_nvcc():
    """Return the path of nvcc, or None. CUDA_HOME, if set, is the only place that counts."""
    if home := os.environ.get("CUDA_HOME"):
        return shutil.which("nvcc", path=f"{home}/bin")
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def needed_nvcc():
    """Return the path of nvcc, or stop."""
    nvcc = find_nvcc()
    if nvcc is None:
        fail("FORCE_CUDA=1, but there is no nvcc in CUDA_HOME, PATH or /usr/local/cuda.", WITHOUT_CUDA)
    return nvcc


def wants_cuda() -> bool:
    if FORCE_CUDA:
        return FORCE_CUDA != "0"
    if cuda_of_torch() is None:
        return False
    if find_nvcc() is None:
        print("curveball_fused: building WITHOUT CUDA kernels: torch has CUDA, but no nvcc is found (CUDA_HOME, PATH).")
        return False
    return True


def release_of(nvcc) -> str:
    return re.search(r"release (\d+\.\d+)", subprocess.check_output([nvcc, "--version"], text=True))[1]


def check_release(nvcc) -> None:
    """Stop if nvcc's CUDA is not that of the installed torch, or not the one that the version promises."""
    release = release_of(nvcc)
    torch_cuda = cuda_of_torch()
    if torch_cuda and torch_cuda.split(".")[0] != release.split(".")[0]:
        fail(
            f"{nvcc} is of CUDA {release}, but the installed torch is built for CUDA {torch_cuda}: the major versions "
            "must agree.\nSet CUDA_HOME to a matching toolkit, or install the torch that matches this one.",
            WITHOUT_CUDA,
        )
    label = re.fullmatch(r"cu(\d+)(\d)", LOCAL_VERSION)
    if label and ".".join(label.groups()) != release:
        fail(
            f"CURVEBALL_LOCAL_VERSION={LOCAL_VERSION} promises CUDA {'.'.join(label.groups())}, but {nvcc} is of "
            f"CUDA {release}.\nSet CUDA_HOME to a toolkit of that release, or give the package another label.",
            WITHOUT_CUDA,
        )


def architectures(nvcc):
    """Return what to compile for: a list such as ["8.0", "9.0+PTX"], from TORCH_CUDA_ARCH_LIST or the default."""
    listed = subprocess.check_output([nvcc, "--list-gpu-arch"], text=True)
    known = [f"{major}.{minor}" for major, minor in re.findall(r"compute_(\d+)(\d)\b", listed)]
    known.sort(key=float)
    wanted = re.split(r"[;,\s]+", os.environ.get("TORCH_CUDA_ARCH_LIST", "").strip("; ,\t"))
    if wanted == [""]:
        wanted = [architecture for architecture in DEFAULT_ARCHITECTURES if architecture in known]
        wanted[-1] += "+PTX"
    too_old = [architecture for architecture in wanted if re.match(r"[1-7]\.", architecture)]
    if too_old:
        print(f"curveball_fused: no kernels for {' '.join(too_old)}: they need compute capability 8.0 or later.")
        wanted = [architecture for architecture in wanted if architecture not in too_old]
    if not wanted:
        fail("TORCH_CUDA_ARCH_LIST names nothing from 8.0 on.", WITHOUT_CUDA)
    for architecture in wanted:
        number = re.fullmatch(r"(\d+\.\d)[af]?(\+PTX)?", architecture)
        if not number or number[1] not in known:
            fail(
                f'TORCH_CUDA_ARCH_LIST names "{architecture}"; {nvcc} knows {", ".join(known)}.\n'
                'Write numbers with semicolons between them, such as "8.0;9.0+PTX", or unset the variable.',
                WITHOUT_CUDA,
            )
    return wanted


def code_generation(architecture):
    """Return nvcc's options: "9.0+PTX" is machine code for 9.0, and PTX that later ones can compile."""
    number = architecture.removesuffix("+PTX").replace(".", "")
    options = [f"-gencode=arch=compute_{number},code=sm_{number}"]
    if architecture.endswith("+PTX"):
        options.append(f"-gencode=arch=compute_{number},code=compute_{number}")
    return options


def run(command):
    """Run a command in sight; its failure is the build's."""
    print(shlex.join(command), flush=True)
    if subprocess.run(command).returncode:
        raise CompileError(f"{command[0]} failed")


def build_cuda(sources, library: Path, objects: Path, torch: Path):
    """Compile the sources with nvcc, side by side, and link them into `library`."""
    nvcc = needed_nvcc()
    check_release(nvcc)
    targets = architectures(nvcc)
    print(f"curveball_fused: CUDA kernels for {' '.join(targets)}")
    jobs = int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)
    macros = [*DEFINES, ("USE_CUDA", "1"), ("CURVEBALL_ARCHITECTURES", f'"{" ".join(targets)}"')]
    # The same host flags as for the CPU library. -isystem: no warnings from torch's headers. file-prefix-map: no path
    # of this machine in the binary.
    host = ["-fPIC", "-g0", "-fvisibility=hidden", f"-ffile-prefix-map={torch}=torch", *WARNINGS]
    compile_ = [nvcc, "-c", "-std=c++17", "-O3", f"--threads={max(1, jobs // len(sources))}"]
    compile_ += [f"-D{name}={value}" for name, value in macros]
    compile_ += ["-isystem", f"{torch}/include", "-isystem", sysconfig.get_path("include")]
    compile_ += ["-Xcompiler", ",".join(host), *(option for a in targets for option in code_generation(a))]
    objects.mkdir(parents=True, exist_ok=True)
    outputs = [str(objects / f"{Path(source).name}.o") for source in sources]
    with ThreadPoolExecutor(jobs) as pool:
        list(pool.map(lambda source, output: run([*compile_, source, "-o", output]), sources, outputs))

    search = [f"-L{torch}/lib"]
    if not (torch / "lib/libtorch_cuda.so").exists():
        # A CPU-only torch: an empty library of that name is enough to record that the real one is needed.
        stub = objects / "libtorch_cuda.so"
        run(["g++", "-shared", "-Wl,-soname,libtorch_cuda.so", "-o", str(stub), "-x", "c++", os.devnull])
        search.append(f"-L{objects}")
    # cudart is inside and hidden: it neither depends on the system's nor meets torch's. nodlink: no kernel calls into
    # another file. No rpath: torch is imported first.
    link = ["-cudart=static", "-nodlink", "-Xlinker", "--exclude-libs,ALL,--no-as-needed", *search]
    library.parent.mkdir(parents=True, exist_ok=True)
    run([nvcc, "-shared", *outputs, *link, "-ltorch_cuda", "-ltorch_cpu", "-o", str(library)])


# ------------------------------------------------------------------------------------------------ setuptools


class BuildNative(build_ext):
    """Point the compilers at torch, only when something is really built; a failure never goes unnoticed."""

    def build_extension(self, ext):
        torch = find_torch()
        try:
            if ext is cuda:
                objects = Path(self.build_temp, "cuda")
                return build_cuda(ext.sources, Path(self.get_ext_fullpath(ext.name)), objects, torch)
            # As in build_cuda.
            ext.extra_compile_args += ["-isystem", f"{torch}/include", f"-ffile-prefix-map={torch}=torch"]
            ext.library_dirs.append(f"{torch}/lib")
            super().build_extension(ext)
        except (CompileError, LinkError) as error:
            way_out = WITHOUT_CUDA if ext is cuda else WITHOUT
            hint = f"curveball_fused: the native kernels did not compile, see above. {way_out}"
            raise type(error)(f"{error}\n{hint}") from error


class WheelWithBill(bdist_wheel):
    """Add the bill of materials, when everything else of the wheel is there."""

    def write_wheelfile(self, wheelfile_base, *args, **options):
        super().write_wheelfile(wheelfile_base, *args, **options)
        sbom = runpy.run_path(str(Path(__file__).with_name("tools") / "sbom.py"))
        dist_info = Path(wheelfile_base)
        compiled_in = []
        if native in extensions:
            torch_version = version_of_torch(find_torch())["__version__"].partition("+")[0]
            compiled_in.append(sbom["torch_headers"](torch_version))
        if cuda in extensions:
            compiled_in.append(sbom["cuda_runtime"](release_of(needed_nvcc())))
        metadata = email.message_from_string((dist_info / "METADATA").read_text(encoding="utf-8"))
        bill = sbom["bill_of_materials"](metadata, compiled_in)
        (dist_info / "sboms").mkdir(exist_ok=True)
        (dist_info / "sboms/curveball_fused.cdx.json").write_text(json.dumps(bill, indent=2) + "\n", encoding="utf-8")


headers = sorted(glob.glob("csrc/**/*.h", recursive=True) + glob.glob("csrc/**/*.cuh", recursive=True))
native = Extension(
    "curveball_fused._C",
    sources=sorted(glob.glob("csrc/cpu/*.cpp")),
    depends=["setup.py", *headers],
    define_macros=DEFINES,
    py_limited_api=True,
    language="c++",
    # No fused multiply-add, no -ffast-math: the same bits from every instruction set.
    extra_compile_args=[
        "-std=c++17",
        "-O3",
        "-g0",
        *WARNINGS,
        "-fvisibility=hidden",
        "-ffp-contract=off",
        "-fno-math-errno",
    ],
    # Resolved by the torch that is imported first: no rpath to the one of the build.
    libraries=["torch_cpu", "c10"],
)
cuda = Extension(
    "curveball_fused._C_cuda",
    sources=sorted(glob.glob("csrc/cuda/*.cu") + glob.glob("csrc/cuda/*.cpp")),
    py_limited_api=True,
)

if not NATIVE:
    print("curveball_fused: building WITHOUT native kernels (CURVEBALL_NATIVE=0): only the Triton and torch backends.")
    extensions = []
else:
    extensions = [native, cuda] if wants_cuda() else [native]

options = {"egg_info": {"tag_build": f"+{LOCAL_VERSION}"}} if LOCAL_VERSION else {}
if NATIVE:
    options["bdist_wheel"] = {"py_limited_api": "cp310"}
setup(ext_modules=extensions, cmdclass={"build_ext": BuildNative, "bdist_wheel": WheelWithBill}, options=options)
