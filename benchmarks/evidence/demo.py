"""Run the demo, keep its runs for the table of README.md, and draw its picture: `python -m benchmarks.evidence.demo`.

Its table has times in it, so on an idle machine; it takes a minute.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from benchmarks.evidence.records import Records

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "examples"))
import demo_report
from demo_training import Run

_ROOT = Path(__file__).resolve().parents[2]
RECORDS = Records("demo", ("optimizer", "seed"))


def tables() -> dict[str, str]:
    """Return the table by name."""
    runs: dict[str, list[Run]] = {}
    for record in RECORDS.read():
        shown = Run(*(record[name] for name in ("steps", "seconds", "train_loss", "test_error")))
        runs.setdefault(record["optimizer"], []).append(shown)
    return {"demo": demo_report.table(runs, record["epochs"]) + "\n"}


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        file, picture = Path(folder, "runs.json"), Path(folder, "demo.png")
        command = [sys.executable, "examples/demo.py", "--runs", str(file), "--output", str(picture)]
        subprocess.run(command, cwd=_ROOT, check=True)
        found = json.loads(file.read_text(encoding="utf-8"))
        for optimizer, runs in found["runs"].items():
            for seed, run in enumerate(runs):
                RECORDS.add({"optimizer": optimizer, "seed": seed, "epochs": found["epochs"]} | run)
        shutil.copyfile(picture, _ROOT / "docs" / "demo.png")  # last, as it would count as a change


if __name__ == "__main__":
    main()
