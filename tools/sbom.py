"""What a wheel is made of, as CycloneDX 1.7, for `.dist-info/sboms/` (PEP 770). `setup.py` writes it.

There is no time and no random number in it, so that one source gives one file.
"""

from __future__ import annotations

import re
from email.message import Message
from typing import Any
from urllib.parse import quote

Component = dict[str, Any]


def included(name: str, version: str, description: str, license: dict[str, str], purl: str) -> Component:
    """Return a component that is compiled into the wheel's libraries."""
    return {
        "type": "library",
        "bom-ref": purl,
        "name": name,
        "version": version,
        "description": description,
        "licenses": [{"license": license}],
        "purl": purl,
    }


def torch_headers(version: str) -> Component:
    return included(
        "torch",
        version,
        "headers of the stable ABI, whose inline functions are compiled in",
        {"id": "BSD-3-Clause"},
        f"pkg:pypi/torch@{version}",
    )


def cuda_runtime(version: str) -> Component:
    return included(
        "cudart",
        version,
        "NVIDIA CUDA Runtime, linked statically",
        {"name": "NVIDIA CUDA Toolkit End User License Agreement", "url": "https://docs.nvidia.com/cuda/eula/"},
        f"pkg:generic/cudart@{version}",
    )


def bill_of_materials(metadata: Message, compiled_in: list[Component]) -> dict[str, Any]:
    """Return the bill of materials of a wheel.

    Args:
        metadata: of the wheel, as in `.dist-info/METADATA`.
        compiled_in: what its libraries contain of others.
    """
    name, version = metadata["Name"], metadata["Version"]
    package = {
        "type": "library",
        "bom-ref": _purl(name, version),
        "name": name,
        "version": version,
        "licenses": [{"license": {"id": metadata["License"]}}],
        "purl": _purl(name, version),
    }
    requirements = [r for r in metadata.get_all("Requires-Dist", []) if "extra ==" not in r]
    components = [*compiled_in, *map(_required, requirements)]
    return {
        "bomFormat": "CycloneDX",
        "specVersion": "1.7",
        "version": 1,
        "metadata": {"lifecycles": [{"phase": "build"}], "component": package},
        "components": components,
        "dependencies": [{"ref": package["bom-ref"], "dependsOn": [c["bom-ref"] for c in components]}],
    }


def _required(requirement: str) -> Component:
    """Return what has to be there when the package runs, and is not in the wheel.

    Args:
        requirement: such as "torch>=2.11"; older tools write "torch (>=2.11)".
    """
    name, versions = re.fullmatch(r"([\w.-]+)\s*\(?([<>=!.,\d\s]*)\)?", requirement).groups()
    constraints = sorted(versions.replace(" ", "").split(","), key=lambda each: each.lstrip("<>=!"))
    return {
        "type": "library",
        "bom-ref": _purl(name),
        "name": name,
        "isExternal": True,
        "versionRange": f"vers:pypi/{'|'.join(constraints)}",
        "purl": _purl(name),
    }


def _purl(name: str, version: str = "") -> str:
    normalized = re.sub(r"[-_.]+", "-", name).lower()
    return f"pkg:pypi/{normalized}" + (f"@{quote(version)}" if version else "")
