"""The command line.

`python -m curveball_fused` prints what was built, which backend was chosen, and why;
`python -m curveball_fused explain FILE_OR_MODULE:FUNCTION` what CurveBall would do with a model, and at what cost.
"""

from __future__ import annotations

import argparse
import importlib
import runpy
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from . import build_info


def main() -> None:
    """Run the command that `sys.argv` gives."""
    parser = argparse.ArgumentParser(
        prog="python -m curveball_fused", description="Print what was built and what runs."
    )
    commands = parser.add_subparsers(dest="command")
    explaining = commands.add_parser("explain", help="what CurveBall would do with a model, and at what cost")
    explaining.add_argument(
        "target", metavar="FILE_OR_MODULE:FUNCTION", help="FUNCTION() returns (model_fn, loss_fn, params)"
    )
    arguments = parser.parse_args()
    if arguments.command is None:
        for key, value in build_info().items():
            print(f"{key:>24}: {value}")
        return
    task = _task(arguments.target, explaining)()
    if not isinstance(task, tuple) or len(task) != 3:
        explaining.error(f"{arguments.target} must return (model_fn, loss_fn, params).")
    from curveball_fused.explanation.procedure import explain

    print(explain(*task))


def _task(target: str, parser: argparse.ArgumentParser) -> Callable[[], Any]:
    """Return the function that a command line names."""
    place, _, name = target.rpartition(":")
    if not place:
        parser.error(f"{target!r} names no function: write FILE_OR_MODULE:FUNCTION.")
    path = Path(place)
    if path.suffix == ".py":
        if not path.is_file():
            parser.error(f"there is no file {place}.")
        sys.path.insert(0, str(path.resolve().parent))  # as when Python runs the file
        contents = runpy.run_path(place)
    else:
        try:
            contents = vars(importlib.import_module(place))
        except ModuleNotFoundError as error:
            parser.error(f"{error}; a file needs its .py.")
    function = contents.get(name)
    if not callable(function):
        parser.error(f"{place} has no function {name!r}.")
    return function  # type: ignore[no-any-return]


if __name__ == "__main__":
    main()
