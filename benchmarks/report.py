"""Tables of a benchmark run, kept as JSON and Markdown with the machine and the versions they belong to."""

from __future__ import annotations

import functools
import json
import os
import platform
import subprocess
import warnings
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

import curveball_fused
from benchmarks.compare import Spread

HERE = Path(__file__).resolve().parent
_KEPT = "benchmarks/results", "docs/figures", "docs/scaling.png"  # figures that were measured before, no sources


def results_folder(default: str = "build/benchmarks") -> Path:
    """Where figures go: the environment variable CURVEBALL_RESULTS, else a folder of the repository, by default."""
    return Path(os.environ.get("CURVEBALL_RESULTS", HERE.parent / default))


@functools.cache
def cores() -> int:
    """How many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


@functools.cache
def environment() -> dict[str, str]:
    """Where and with what a figure was measured."""
    info = curveball_fused.build_info()
    gpu = _gpu() if torch.cuda.is_available() else {}
    return gpu | {
        "cpu": f"{_cpu_model()}, {cores()} cores",
        "torch": torch.__version__,
        "python": platform.python_version(),
        "curveball_fused": info["curveball_fused"],
        "commit": _commit(),
        "date": datetime.now(timezone.utc).date().isoformat(),
    }


def _gpu() -> dict[str, str]:
    query = "nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"
    try:
        driver = subprocess.check_output(query, text=True).split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        driver = "unknown"
    return {
        "gpu": torch.cuda.get_device_name(),
        "driver": driver,
        "cuda": torch.version.cuda or "none",
        "triton": _version("triton"),
    }


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str:
    """The commit, marked where sources differ from it; figures don't count.

    Where the sources have come without their history, the environment variable COMMIT may name it.
    """

    def git(*arguments: str) -> str:
        command = ("git", *arguments)
        return subprocess.check_output(command, cwd=HERE, stderr=subprocess.DEVNULL, text=True)

    try:
        changed = git("status", "--porcelain", "--", ":/", *(f":(top,exclude){path}" for path in _KEPT)).strip()
        commit = git("rev-parse", "--short=12", "HEAD").strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("COMMIT", "no commit")
    return f"{commit}, with changes" if changed else commit


def threads_text(count: int) -> str:
    return "1 thread" if count == 1 else f"{count} threads"


@dataclass(frozen=True)
class Table:
    """One table.

    Attributes:
        title: by which a later run finds and replaces it.
        note: what was measured, in a sentence or two.
        rows: one dict per row, all with the same keys, which head the columns.
        load: the machine's load average when the table was done; beyond what the benchmark itself runs, others
            disturbed it.
        environment: where and with what it was measured.
    """

    title: str
    note: str
    rows: list[dict[str, Any]]
    load: float
    environment: dict[str, str]

    def markdown(self) -> str:
        columns = list(self.rows[0])
        lines = [f"### {self.title}", "", f"{self.note} Load average at the end: {self.load}.", ""]
        lines.append("| " + " | ".join(columns) + " |")
        lines.append("|" + "|".join(" --- " if i == 0 else " ---: " for i in range(len(columns))) + "|")
        lines += ["| " + " | ".join(_text(row[c]) for c in columns) + " |" for row in self.rows]
        return "\n".join(lines) + "\n"


def _text(value: object) -> str:
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return "" if value is None else str(value)


def bar(ratio: Spread, most: float) -> str:
    """The text of a bar's column: by the median, with a warning where the spread reaches across the bar."""
    verdict = "met" if ratio.median <= most else "MISSED"
    return f"≤ {most:g}: {verdict}{_doubt(ratio, most)}"


def bar_from_below(ratio: Spread, least: float) -> str:
    """As `bar`, for what should be large."""
    verdict = "met" if ratio.median >= least else "MISSED"
    return f"≥ {least:g}: {verdict}{_doubt(ratio, least)}"


def _doubt(ratio: Spread, at: float) -> str:
    return " (unsure: in the spread)" if ratio.p20 <= at < ratio.p80 else ""


class Report:
    """The tables in `<folder>/<name>.json`, and the same as Markdown.

    Files are rewritten after each table, so a run that is partial, or is interrupted, replaces only what it
    measured.

    Args:
        folder: made where it does not exist.
        name: of the files, without suffix.
        command: what makes them, for their readers.

    Attributes:
        folder: as above.
        measured: the tables of this run.
    """

    def __init__(self, folder: Path, name: str = "cpu", command: str = "make bench") -> None:
        self.folder = folder
        self._json, self._markdown = folder / f"{name}.json", folder / f"{name}.md"
        self._command = command
        self.measured: list[Table] = []

    def add(self, title: str, note: str, rows: list[dict[str, Any]]) -> None:
        """Keep a table that was just measured and write the files."""
        table = Table(title, note, rows, round(os.getloadavg()[0], 1), environment())
        self.measured.append(table)
        tables = {t.title: t for t in self._read()} | {table.title: table}
        ordered = sorted(tables.values(), key=lambda t: t.title)
        self.folder.mkdir(parents=True, exist_ok=True)
        content = {"tables": [asdict(t) for t in ordered]}
        _write(self._json, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
        _write(self._markdown, _document(ordered, self._command))

    def _read(self) -> list[Table]:
        if not self._json.exists():
            return []
        try:
            return [Table(**table) for table in json.loads(self._json.read_text(encoding="utf-8"))["tables"]]
        except (ValueError, KeyError, TypeError) as error:
            warnings.warn(f"{self._json.name}: unreadable tables dropped ({error}).", stacklevel=3)
            return []


def _document(tables: list[Table], command: str) -> str:
    """All tables, those of one environment together."""
    groups: dict[str, list[Table]] = {}
    for table in tables:
        heading = "\n".join(f"* {key}: {value}" for key, value in table.environment.items())
        groups.setdefault(heading, []).append(table)
    parts = [f"# Benchmarks\n\nWritten by `{command}`. Judge by the ratios within a table.\n"]
    for heading, group in groups.items():
        parts += [f"## Measured with\n\n{heading}\n", *(table.markdown() for table in group)]
    return "\n".join(parts)


def _write(path: Path, text: str) -> None:
    """Replace a file at once, so that an interruption leaves the old or the new one."""
    temporary = path.with_suffix(path.suffix + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    temporary.replace(path)
