"""What the bill of materials in a wheel says, and that `tools/check_wheel.py` refuses a wrong one."""

from __future__ import annotations

import email
import json
import os
import runpy
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
SBOM = runpy.run_path(str(ROOT / "tools" / "sbom.py"))
METADATA = """\
Name: curveball_fused
Version: 0.1.0+cu130
License: BSD-3-Clause
Requires-Dist: torch<3,>=2.11
Requires-Dist: typing_extensions (>=4.4)
Requires-Dist: pytest; extra == "dev"
"""
COMPILED_IN = {
    "pure": [],
    "native": [SBOM["torch_headers"]("2.13.0")],
    "cuda": [SBOM["torch_headers"]("2.13.0"), SBOM["cuda_runtime"]("13.0")],
}


def bill(kind: str) -> dict[str, Any]:
    made: dict[str, Any] = SBOM["bill_of_materials"](email.message_from_string(METADATA), COMPILED_IN[kind])
    return made


@pytest.mark.parametrize("kind", COMPILED_IN)
def test_it_names_the_package_what_is_in_it_and_what_it_needs(kind: str) -> None:
    made = bill(kind)
    package = made["metadata"]["component"]
    assert (package["name"], package["version"]) == ("curveball_fused", "0.1.0+cu130")
    assert package["licenses"] == [{"license": {"id": "BSD-3-Clause"}}]
    assert package["purl"] == "pkg:pypi/curveball-fused@0.1.0%2Bcu130"
    inside = [(c["name"], c["version"]) for c in made["components"] if not c.get("isExternal")]
    assert inside == [("torch", "2.13.0"), ("cudart", "13.0")][: len(COMPILED_IN[kind])]
    outside = {c["name"]: c["versionRange"] for c in made["components"] if c.get("isExternal")}
    assert outside == {"torch": "vers:pypi/>=2.11|<3", "typing_extensions": "vers:pypi/>=4.4"}
    (own,) = made["dependencies"]
    assert own["dependsOn"] == [c["bom-ref"] for c in made["components"]]


def wheel_with(made: dict[str, Any], kind: str, folder: Path) -> Path:
    wheel = folder / f"{kind}.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("curveball_fused-0.1.0.dist-info/METADATA", METADATA)
        archive.writestr("curveball_fused-0.1.0.dist-info/sboms/curveball_fused.cdx.json", json.dumps(made))
    return wheel


def drop_torch(made: dict[str, Any]) -> None:
    made["components"].pop()


def rename(made: dict[str, Any]) -> None:
    made["metadata"]["component"]["version"] = "0.2.0"


def date(made: dict[str, Any]) -> None:
    made["metadata"]["timestamp"] = "2026-01-01T00:00:00Z"


def misspell(made: dict[str, Any]) -> None:
    made["component"] = made.pop("components")


@pytest.mark.parametrize("kind", COMPILED_IN)
@pytest.mark.parametrize(
    ("spoil", "said"),
    [
        (None, ""),
        (drop_torch, "outside"),
        (rename, "not what METADATA says"),
        (date, "when it was written"),
        (misspell, r"not CycloneDX 1\.7"),
    ],
)
def test_the_check_of_wheels(
    kind: str, spoil: Callable[[dict[str, Any]], None] | None, said: str, tmp_path: Path
) -> None:
    pytest.importorskip("cyclonedx")  # comes with the tools of `make wheel`
    check_bill = runpy.run_path(str(ROOT / "tools" / "check_wheel.py"))["check_bill"]
    made = bill(kind)
    if spoil is None:
        check_bill(wheel_with(made, kind, tmp_path), kind)
        others = COMPILED_IN.keys() - {kind}
        for other in others:
            with pytest.raises(SystemExit, match="inside"):
                check_bill(wheel_with(made, kind, tmp_path), other)
    else:
        spoil(made)
        with pytest.raises(SystemExit, match=said):
            check_bill(wheel_with(made, kind, tmp_path), kind)


@pytest.mark.slow
def test_a_build_writes_the_same_one_each_time(tmp_path: Path) -> None:
    texts = []
    for name in ("first", "second"):
        source = tmp_path / name
        source.mkdir()
        for file in ("setup.py", "pyproject.toml", "README.md", "LICENSE", "MANIFEST.in"):
            shutil.copy(ROOT / file, source)
        for folder in ("curveball_fused", "tools"):
            shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
        build = [sys.executable, "-m", "pip", "--disable-pip-version-check", "wheel", "--quiet", "--no-index"]
        build += ["--no-build-isolation", "--no-deps", "--wheel-dir", str(source / "dist"), str(source)]
        subprocess.run(build, check=True, env=os.environ | {"CURVEBALL_NATIVE": "0"})
        (wheel,) = (source / "dist").iterdir()
        with zipfile.ZipFile(wheel) as archive:
            texts.append(archive.read("curveball_fused-0.1.0.dist-info/sboms/curveball_fused.cdx.json"))
    assert texts[0] == texts[1]
    assert [c["name"] for c in json.loads(texts[0])["components"]] == ["torch", "typing_extensions"]
