"""Load a CUDA wheel into a real CUDA build of torch, on a machine that needs neither a GPU nor the CUDA libraries.

    python tools/check_cuda_load.py dist/*+cu130*.whl --cache ~/.cache/curveball_fused

Whether the library finds every symbol it needs, and registers all its kernels, shows only in the torch that it is made
for. That is also the oldest torch that is supported, so all names of `curveball_fused._torch_private` and of its module
`compiler` are looked up there; neither needs the CUDA libraries or Triton to be imported. Last, the CPU takes a step.

That torch is installed without its dependencies, except cudart and cupti; all the other CUDA libraries are replaced by
stubs that have the right names and symbols and abort when called. The first run downloads 0.6 GB and takes 2.0 GB of
disk; with --cache a later run needs seconds.
"""

from __future__ import annotations

import argparse
import collections
import os
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from check_wheel import STEP

# The oldest torch that the stable ABI serves, and the parts of CUDA's that run when it is imported.
TORCH = "torch==2.11.0"
REAL = ["cuda-toolkit[cudart,cupti]==13.0.2"]
STUBBED = r"lib(cu(?!dart|pti)|nccl|nv)"
PURE = ["filelock", "fsspec", "jinja2", "networkx", "sympy", "typing-extensions"]

LOAD = """\
import importlib
import warnings
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # the package does not need it
import torch
import curveball_fused

info = curveball_fused.build_info()
for key, value in info.items():
    print(f"{key:>24}: {value}")
assert torch.version.cuda, "this torch is not a CUDA build"
assert info["cuda library"] == "loaded", info["cuda library"]
operators = [name for name in torch._C._dispatch_get_all_op_names() if name.startswith("curveball_fused::")]
# The tangents of functions are Triton's on a GPU, and the matrix products of a metric torch's.
on_cpus = "_tangent", "::activation", "::precondition_in_bases", "::update_statistics_"
operators = [name for name in operators if not name.endswith(on_cpus)]
missing = [o for o in operators if not torch._C._dispatch_has_kernel_for_dispatch_key(o, "CUDA")]
assert operators and not missing, f"without a CUDA kernel: {missing or 'all'}"
print("with CUDA kernels:", *sorted(o.removeprefix("curveball_fused::") for o in operators))
for name in ("curveball_fused._torch_private", "curveball_fused._torch_private.compiler"):
    module = importlib.import_module(name)
    missing = [each for each in module.__all__ if not hasattr(module, each)]
    assert not missing, f"{name}: torch {torch.__version__} lacks {missing}"
    print(f"{name}: all {len(module.__all__)} names are there")
"""


def output(*command: str) -> str:
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def make_stubs(libraries: Path, stubs: Path) -> None:
    """Write a stub for every CUDA library, but the real ones, that the libraries in a folder need."""
    paths = sorted(map(str, libraries.glob("*.so")))
    headers = output("objdump", "-p", *paths)
    needed = {name for name in re.findall(r"NEEDED\s+(\S+)", headers) if re.match(STUBBED, name)}
    # The version of a symbol tells its library. A symbol without a version can be of any, so every stub has them all.
    versions: dict[str, set[str]] = collections.defaultdict(set)
    for library, lines in re.findall(r"required from (\S+):\n((?:\s+0x.*\n)+)", headers):
        versions[library] |= set(re.findall(r"(\S+)\n", lines))
    symbols = re.findall(
        r"^.{16} (\w) ([^\s@]+)(?:@+(\S+))?$", output("nm", "-D", "--with-symbol-versions", *paths), re.MULTILINE
    )
    defined = {name for kind, name, _ in symbols if kind not in "Uvw"}
    undefined: dict[str, set[str]] = collections.defaultdict(set)
    for kind, name, version in symbols:
        if kind == "U" and name not in defined and (version or re.match(r"cu(?!pti)|p?nccl|nv", name)):
            undefined[version].add(name)

    stubs.mkdir(parents=True, exist_ok=True)
    for library in sorted(needed):
        names = undefined[""].union(*(undefined[version] for version in versions[library]))
        source = "".join(f"void {name}(void) {{ __builtin_trap(); }}\n" for name in sorted(names))
        script = "".join(f"{v} {{ global: {'; '.join(undefined[v])}; }};\n" for v in sorted(versions[library]))
        Path(stubs, "stub.c").write_text(source)
        Path(stubs, "stub.map").write_text(script or "{ global: *; };")
        command = ["gcc", "-w", "-shared", "-fPIC", "-fno-builtin", "-o", f"{stubs}/{library}", f"{stubs}/stub.c"]
        subprocess.run([*command, f"-Wl,-soname,{library},--version-script={stubs}/stub.map"], check=True)


def make_environment(directory: Path) -> None:
    """Make a virtual environment with the CUDA torch, and the stubs beside it."""
    venv.create(directory, with_pip=True)
    pip = [f"{directory}/bin/python", "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "-q"]
    subprocess.run([*pip, *PURE, *REAL], check=True)
    subprocess.run([*pip, "--no-deps", TORCH], check=True)
    (torch,) = directory.glob("lib/python*/site-packages/torch/lib")
    make_stubs(torch, directory / "stubs")


def check(wheel: Path, directory: Path) -> None:
    ready = directory / "ready"
    if not ready.exists():
        make_environment(directory)
        ready.touch()
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"LD_LIBRARY_PATH": str(directory / "stubs"), "CURVEBALL_REQUIRE_NATIVE": "1"}
    python = f"{directory}/bin/python"
    install = ["-m", "pip", "--disable-pip-version-check", "install", "-q", "--force-reinstall", "--no-deps"]
    subprocess.run([python, *install, str(wheel.resolve())], check=True)
    for program in ([LOAD], [STEP, "cpu"]):
        subprocess.run([python, "-c", *program], check=True, env=environment, cwd=directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("wheel", type=Path, help="for the CUDA major version of " + TORCH)
    parser.add_argument("--cache", type=Path, help="keep the environment with torch in this directory")
    arguments = parser.parse_args()
    try:
        if arguments.cache:
            check(arguments.wheel, arguments.cache.resolve())
        else:
            with tempfile.TemporaryDirectory() as directory:
                check(arguments.wheel, Path(directory))
    except subprocess.CalledProcessError as error:
        sys.exit(f"{arguments.wheel.name}: {error.cmd[0]} failed, see above")
    print(f"{arguments.wheel.name}: loaded into {TORCH}, with all CUDA kernels and private names: good")


if __name__ == "__main__":
    main()
