"""Raw data of the evidence: one JSON line for each run, written as it ends, in benchmarks/results/evidence/.

A part that is started again leaves out the runs that are there, so it may be stopped at any time.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from tqdm import tqdm

from benchmarks.report import environment

FOLDER = Path(__file__).resolve().parents[1] / "results" / "evidence"

Record = dict[str, Any]


class Records:
    """The runs of one part.

    Args:
        part: names the file, without suffix.
        key: the entries that tell one run from another.
        folder: that the file is in.
    """

    def __init__(self, part: str, key: tuple[str, ...], folder: Path = FOLDER) -> None:
        self.path = folder / f"{part}.jsonl"
        self._key = key

    def read(self) -> list[Record]:
        """Return all runs, in the order of their keys' first appearance; of a run that was repeated the last one."""
        if not self.path.exists():
            return []
        lines = self.path.read_text(encoding="utf-8").splitlines()
        return list({self._name(record): record for record in map(json.loads, lines)}.values())

    def missing(self, runs: Iterable[Record]) -> Iterator[Record]:
        """Give those of `runs`, records with their keys alone, that are not there yet, behind a progress bar."""
        there = {self._name(record) for record in self.read()}
        yield from tqdm([run for run in runs if self._name(run) not in there], desc=self.path.stem)

    def add(self, record: Record) -> None:
        """Append a run, with where and with what it was made. Numbers that are not finite become None."""
        made = environment()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        whole = _finite(record) | {name: made[name] for name in ("cpu", "torch", "python", "commit", "date")}
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(whole, ensure_ascii=False, allow_nan=False) + "\n")

    def _name(self, record: Record) -> str:
        return json.dumps([record[name] for name in self._key])


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
