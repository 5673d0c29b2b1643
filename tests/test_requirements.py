"""The locks in requirements/: exact, hashed, and those of what is asked for. `make lock` writes them anew."""

from __future__ import annotations

import importlib.metadata
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

REQUIREMENTS = Path(__file__).parents[1] / "requirements"
PYTHONS = ("3.10", "3.11", "3.12", "3.13")
STALE = "run `make lock`"


def lines(name: str) -> list[str]:
    """Requirements of a file, with their hashes, without comments."""
    text = re.sub(r"(^|\s)#.*", "", (REQUIREMENTS / name).read_text(), flags=re.MULTILINE)
    return [line for line in text.replace("\\\n", "").splitlines() if line.strip()]


def locked(name: str, environment: dict[str, str]) -> dict[str, str]:
    """Names and versions that pip takes from a lock."""
    found = {}
    for requirement in (Requirement(line.partition("--hash")[0]) for line in lines(name)):
        if requirement.marker is None or requirement.marker.evaluate(environment):
            (pin,) = requirement.specifier
            assert pin.operator == "==" and requirement.name not in found
            found[requirement.name] = pin.version
    return found


def extra(name: str, environment: dict[str, str]) -> Iterator[Requirement]:
    """What this package needs, and what the extra adds."""
    for requirement in map(Requirement, importlib.metadata.requires("curveball_fused") or ()):
        if requirement.marker is None or requirement.marker.evaluate(environment | {"extra": name}):
            if canonicalize_name(requirement.name) == "curveball-fused":
                for other in requirement.extras:
                    yield from extra(other, environment)
            else:
                yield requirement


@pytest.mark.parametrize("python", PYTHONS)
@pytest.mark.parametrize("platform", ["linux", "darwin"])
@pytest.mark.parametrize("name", ["dev", "wheel"])
def test_lock_has_what_is_asked_for(name: str, platform: str, python: str) -> None:
    environment = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": platform}
    wanted = [r for r in map(Requirement, lines(f"{name}.in")) if r.marker is None or r.marker.evaluate(environment)]
    if name == "dev":
        wanted += extra("dev", environment)
    found, unlocked = locked(f"{name}.txt", environment), lines("unlocked.txt")
    for requirement in wanted:
        if requirement.name not in unlocked:
            version = found.get(canonicalize_name(requirement.name))
            assert version is not None and requirement.specifier.contains(version), f"{requirement}: {STALE}"
    assert not found.keys() & set(unlocked)


def test_the_two_locks_agree() -> None:
    for python in PYTHONS:
        environment = {"python_version": python, "python_full_version": f"{python}.0", "sys_platform": "linux"}
        dev, wheel = locked("dev.txt", environment), locked("wheel.txt", environment)
        assert {name: dev[name] for name in dev.keys() & wheel} == {n: wheel[n] for n in dev.keys() & wheel}


@pytest.mark.parametrize("name", ["dev.txt", "wheel.txt"])
def test_every_line_is_hashed_and_names_no_index(name: str) -> None:
    for line in lines(name):
        assert re.search(r"--hash=sha256:[0-9a-f]{64}", line), line
    assert "://" not in (REQUIREMENTS / name).read_text()
    assert not [line for line in lines(name) if line.startswith("-")]
