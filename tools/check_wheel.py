"""Check a wheel: what it contains and says that it does, and with --install that it works in a fresh environment.

python tools/check_wheel.py --native dist/*.whl --install
"""

from __future__ import annotations

import argparse
import email
import importlib.metadata
import json
import os
import re
import subprocess
import sys
import tempfile
import venv
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIBRARIES = {
    "pure": set(),
    "native": {"curveball_fused/_C.abi3.so"},
    "cuda": {"curveball_fused/_C.abi3.so", "curveball_fused/_C_cuda.abi3.so"},
}

COMPILED_IN = {"pure": [], "native": ["torch"], "cuda": ["torch", "cudart"]}

# Run in the fresh environment, away from the sources: a step must move the weights with the right backend.
STEP = """\
import sys, warnings
warnings.filterwarnings("ignore", message="Failed to initialize NumPy")  # the package does not need it
import torch
import torch.nn.functional as F
from curveball_fused import CurveBall, build_info

torch.manual_seed(0)
model, x, y = torch.nn.Linear(5, 3), torch.randn(8, 5), torch.randn(8, 3)
before = model.weight.detach().clone()
loss, out = CurveBall(model.parameters()).step(lambda: model(x), lambda out: F.mse_loss(out, y))
assert out.shape == y.shape and F.mse_loss(model(x), y) < loss, "the step did not lower the loss"
assert not torch.equal(before, model.weight), "the step left the weights alone"
assert build_info()["backend"] == sys.argv[1], build_info()
"""


def check_contents(wheel: Path, kind: str) -> None:
    """Stop unless the wheel has the right name, every module, the libraries of its kind, and nothing else."""
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    local = {"pure": "", "native": r"(\+cpu)?", "cuda": r"\+cu\d+"}[kind]  # set by CURVEBALL_LOCAL_VERSION
    tag = "py3-none-any" if kind == "pure" else "cp310-abi3-.*"
    if not re.fullmatch(rf"curveball_fused-{re.escape(version)}{local}-{tag}\.whl", wheel.name):
        sys.exit(f"{wheel.name}: the name should be curveball_fused-{version}{local}-{tag}.whl")
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if ".dist-info/" not in name and not name.endswith("/")}
        libraries = {name: archive.read(name) for name in LIBRARIES[kind] & packed}
    sources = {str(path.relative_to(ROOT)) for path in ROOT.glob("curveball_fused/**/*.py")}
    wanted = sources | {"curveball_fused/py.typed"} | LIBRARIES[kind]
    if packed != wanted:
        sys.exit(f"{wheel.name}: missing {sorted(wanted - packed)}, not expected {sorted(packed - wanted)}")
    # A path of the machine that built it, such as an rpath, would make the library depend on that machine.
    for name, library in libraries.items():
        for path in (str(ROOT), sys.prefix):
            if path.encode() in library:
                sys.exit(f"{wheel.name}: {name} contains the path {path}")


def check_bill(wheel: Path, kind: str) -> None:
    """Stop unless the bill of materials keeps to its schema, and says what the wheel's metadata says."""
    from cyclonedx.schema import SchemaVersion  # not at the top, as `check_cuda_load` imports this file without it
    from cyclonedx.validation.json import JsonStrictValidator

    with zipfile.ZipFile(wheel) as archive:
        texts = {name: archive.read(name).decode() for name in archive.namelist() if ".dist-info/" in name}
    bills = [name for name in texts if "/sboms/" in name and not name.endswith("/")]
    if len(bills) != 1 or not bills[0].endswith(".dist-info/sboms/curveball_fused.cdx.json"):
        sys.exit(f"{wheel.name}: should have sboms/curveball_fused.cdx.json and no other; has {bills}")
    if error := JsonStrictValidator(SchemaVersion.V1_7).validate_str(texts[bills[0]]):
        sys.exit(f"{wheel.name}: {bills[0]} is not CycloneDX 1.7: {error}")
    bill = json.loads(texts[bills[0]])
    metadata = email.message_from_string(next(text for name, text in texts.items() if name.endswith("/METADATA")))
    package = bill["metadata"]["component"]
    said = [package["name"], package["version"], package["licenses"][0]["license"]["id"]]
    if said != [metadata["Name"], metadata["Version"], metadata["License"]]:
        sys.exit(f"{wheel.name}: {bills[0]} names {said}, which is not what METADATA says")
    inside = [component["name"] for component in bill["components"] if not component.get("isExternal")]
    outside = {component["name"] for component in bill["components"] if component.get("isExternal")}
    if inside != COMPILED_IN[kind] or outside != {"torch", "typing_extensions"}:
        sys.exit(f"{wheel.name}: {bills[0]} has {inside} inside and {sorted(outside)} outside")
    if "timestamp" in bill["metadata"] or "serialNumber" in bill:
        sys.exit(f"{wheel.name}: {bills[0]} depends on when it was written")


def check_installed(wheel: Path, kind: str) -> None:
    """Install the wheel, with the torch that runs this script, in a fresh environment and take one step."""
    torch = "torch==" + importlib.metadata.version("torch").split("+")[0]
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "CURVEBALL_REQUIRE_NATIVE")}
    if kind == "native":
        environment["CURVEBALL_REQUIRE_NATIVE"] = "1"
    with tempfile.TemporaryDirectory() as directory:
        venv.create(directory, with_pip=True)
        python = str(Path(directory, "bin", "python"))
        install = [python, "-m", "pip", "--disable-pip-version-check", "--no-input", "install", "-q"]
        subprocess.run([*install, torch, str(wheel.resolve())], check=True, env=environment)
        step = [python, "-c", STEP, "torch" if kind == "pure" else "cpu"]
        subprocess.run(step, check=True, env=environment, cwd=directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    kinds = parser.add_mutually_exclusive_group(required=True)
    kinds.add_argument("--native", type=Path, metavar="WHEEL", help="a wheel that must have the native library")
    kinds.add_argument("--cuda", type=Path, metavar="WHEEL", help="a wheel that must have the CUDA library too")
    kinds.add_argument("--pure", type=Path, metavar="WHEEL", help="a wheel that must be Python only")
    parser.add_argument("--install", action="store_true", help="also take a step, on the CPU, in a fresh environment")
    arguments = parser.parse_args()
    kind = next(kind for kind in LIBRARIES if getattr(arguments, kind))
    wheel = getattr(arguments, kind)
    check_contents(wheel, kind)
    check_bill(wheel, kind)
    if arguments.install:
        check_installed(wheel, kind)
    print(f"{wheel.name}: {'installed, stepped' if arguments.install else 'contents'}: good")


if __name__ == "__main__":
    main()
