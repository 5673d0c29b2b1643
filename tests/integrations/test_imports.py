"""The package imports no trainer, and the mixin for Lightning needs none to be imported."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

TRAINERS = ("accelerate", "ignite", "lightning", "transformers")
IMPORTS = f"""
import sys
import curveball_fused, curveball_fused.integrations.lightning
loaded = set({TRAINERS}) & set(sys.modules)
assert not loaded, loaded
"""


def test_no_trainer_is_imported() -> None:
    subprocess.run([sys.executable, "-c", IMPORTS], check=True, cwd=Path(__file__).parents[2])
