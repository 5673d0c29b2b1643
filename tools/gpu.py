"""What `make gpu` does: build for this machine's GPU, test, check memory accesses, measure, and report.

    python3 tools/gpu.py <folder for the results> [--limit SECONDS] [--benchmarks NAME ...]

Needs what is installed: a torch with CUDA, Triton, nvcc, a C++ compiler and pytest; fetches nothing. (Where pytest is
missing, wheels of pytest, pluggy, iniconfig, packaging and pygments in a folder wheels/ serve.) With pytest-xdist the
tests run in several processes. All stages run, but nothing without a build; each has a limit on its time, and all of
them together the one given. The folder then holds the logs of the stages, and gpu.json and gpu.md with the figures. The
exit status is 1 if a stage failed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WHEELS = ROOT / "wheels"
LIMIT = 900.0  # seconds for everything but the report
# torch as it is installed, and the GPU: what has to be known before anything is built.
PROBE = """
import json, torch
gpu = torch.cuda.is_available()
capability = torch.cuda.get_device_capability() if gpu else ()
name = torch.cuda.get_device_name() if gpu else ""
print(json.dumps(dict(torch=torch.__version__, gpu=name, capability=".".join(map(str, capability)))))
"""
# Of the kernels, not of what libraries try out in the driver.
SANITIZER = ("--report-api-errors", "no", "--print-limit", "20", "--error-exitcode", "9")
TRIAL = "import torch; torch.ones(1, device='cuda').add_(1).item()"
# Each in a process of its own, since a kernel that fails leaves nothing usable behind. The most important first.
BENCHMARKS = {
    "parameters": "test_gpu_parameters.py",
    "metric": "test_gpu_metric.py",
    "losses": "test_gpu_loss_kernels.py",
    "tangents": "test_gpu_tangents.py",
    "steps": "test_gpu_steps.py",
    "graphs": "test_gpu_graphed_steps.py",
}
TESTS = {
    "cuda": "not triton and not test_gpu_graphs",
    "graphs": "test_gpu_graphs",
    "triton": "triton and not test_gpu_losses and not test_gpu_graphs",
    "triton-losses": "triton and test_gpu_losses",
}
# The log names the test that is running, and where it stands if it hangs.
PYTEST = (sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-v", "-o", "faulthandler_timeout=60")
# Most of the time of the tests goes into compiling Triton kernels, on one core each.
PROCESSES = ("-p", "xdist", "-n", str(max(1, (os.cpu_count() or 1) // len(TESTS))))
LOGS = threading.Lock()


@dataclass(frozen=True)
class Stage:
    """A stage of the run.

    Attributes:
        name: for tables; what stands before a comma names the log.
        command: what runs, without a shell.
        limit: seconds.
        summarize: finds in the output what the table is to say; where it finds nothing, the stage has failed.
        shown: whether its output is printed even if it is ok.
        skipped: why it doesn't run.
    """

    name: str
    command: tuple[str, ...]
    limit: float
    summarize: Callable[[str], str]
    shown: bool = False
    skipped: str = ""

    @property
    def log(self) -> str:
        return self.name.partition(",")[0] + ".log"


@dataclass(frozen=True)
class Result:
    """How a stage ended."""

    stage: str
    outcome: str
    seconds: float
    detail: str


def run(stage: Stage, folder: Path, environment: dict[str, str], deadline: float) -> Result:
    """Run a stage, its output into its log, and stop it and all that it started when its time is over."""
    if stage.skipped:
        return Result(stage.name, "skipped", 0.0, stage.skipped)
    limit = min(stage.limit, deadline - time.monotonic())
    if limit <= 0:
        return Result(stage.name, "failed", 0.0, "no time was left")
    print(f"{stage.name} ...", flush=True)
    start = time.monotonic()
    with tempfile.TemporaryFile() as own:
        process = subprocess.Popen(
            stage.command, cwd=ROOT, env=environment, stdout=own, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            status: int | None = process.wait(limit)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            if process.returncode is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        own.seek(0)
        output = own.read().decode(errors="replace")
    seconds = time.monotonic() - start
    with LOGS, (folder / stage.log).open("a", encoding="utf-8") as log:
        log.write(f"### {stage.name}, {seconds:.0f} s: {' '.join(stage.command)}\n{output}\n")
    detail = stage.summarize(output)
    ok = status == 0 and detail
    if stage.shown or not ok:
        print("\n".join(output.splitlines()[-30:]), flush=True)
    if ok:
        return Result(stage.name, "ok", seconds, detail)
    reason = f"exit status {status}" if status is not None else f"stopped after {limit:.0f} s"
    return Result(stage.name, "failed", seconds, f"{reason}; {detail}" if detail else f"{reason}; see {stage.log}")


def last(pattern: str) -> Callable[[str], str]:
    """Summarize by the last line in which `pattern` occurs."""

    def summarize(output: str) -> str:
        lines = [line.strip(" =") for line in output.splitlines() if re.search(pattern, line)]
        return lines[-1] if lines else ""

    return summarize


def why_not_sanitizer(tool: str | None) -> str:
    """Why compute-sanitizer cannot be used here, found by a trial; empty if it can."""
    if tool is None:
        return "no compute-sanitizer in PATH or /usr/local/cuda/bin"
    try:
        command = [tool, *SANITIZER, sys.executable, "-c", TRIAL]
        trial = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"compute-sanitizer does not run: {error}"
    said = [line.strip("= ") for line in trial.stdout.splitlines() if line.startswith("=========")]
    return "" if said and said[-1] == "ERROR SUMMARY: 0 errors" else f"compute-sanitizer cannot watch: {' '.join(said)}"


def sanitizer_stages() -> list[Stage]:
    """Every operator once under compute-sanitizer, whose last line says that it watched."""
    tool = shutil.which("compute-sanitizer") or shutil.which("compute-sanitizer", path="/usr/local/cuda/bin")
    why_not = why_not_sanitizer(tool)
    stages = []
    for i, check in enumerate(("memcheck", "racecheck", "initcheck")):
        options = ("--tool", check, "--port", str(49152 + 100 * i))  # as they run side by side
        command = (tool or "", *SANITIZER, *options, sys.executable, "-m", "tests.gpu.operators")
        stages.append(Stage(f"sanitizer, {check}", command, 100, last("SUMMARY: 0 (errors|hazards)"), skipped=why_not))
    return stages


def all_stages(measured: list[str]) -> list[list[Stage]]:
    """In order, the build first; those of one list run side by side.

    The sanitizer finds the Triton kernels compiled. What the benchmarks need is not known beforehand: they get all that
    is left, one at a time and in one process.

    Args:
        measured: names of `BENCHMARKS`.
    """
    testing = (*PYTEST, *(PROCESSES if importlib.util.find_spec("xdist") else ()), "--durations=10", "-rs", "tests/gpu")
    tests = [
        Stage(f"tests, {name}", (*testing, "-k", choice), 150, last(r"\d passed")) for name, choice in TESTS.items()
    ]
    benchmarks = [
        Stage(f"benchmarks, {name}", (*PYTEST, f"benchmarks/gpu/{BENCHMARKS[name]}"), math.inf, last(r"\d passed"))
        for name in measured
    ]
    return [
        [Stage("build", (sys.executable, "setup.py", "build_ext", "--inplace"), 150, last("_C_cuda"))],
        [Stage("build, info", (sys.executable, "-m", "curveball_fused"), 30, last("backend: cuda$"), shown=True)],
        tests,
        sanitizer_stages(),
        *([stage] for stage in benchmarks),
    ]


def environment(capability: str, folder: Path) -> dict[str, str]:
    """For all stages."""
    variables = dict(
        FORCE_CUDA="1",
        TORCH_CUDA_ARCH_LIST=capability,
        MAX_JOBS=str(os.cpu_count() or 1),
        CURVEBALL_REQUIRE_NATIVE="1",
        CURVEBALL_RESULTS=str(folder),
        PYTHONUNBUFFERED="1",
        PYTEST_DISABLE_PLUGIN_AUTOLOAD="1",  # plugins that happen to be installed are not needed
    )
    places = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    if importlib.util.find_spec("pytest") is None:
        wheels = sorted(str(wheel) for wheel in WHEELS.glob("*.whl"))
        if not any(Path(wheel).name.startswith("pytest-") for wheel in wheels):
            sys.exit(
                f"gpu: pytest is not installed, and there is no wheel of it in {WHEELS}/. Put one there, or install it."
            )
        places += wheels
    return os.environ | variables | {"PYTHONPATH": os.pathsep.join(filter(None, places))}


def report(folder: Path, results: list[Result], probe: dict[str, str]) -> None:
    """The summary as one more table beside those of the benchmarks."""
    sys.path[:0] = [str(ROOT)]
    from benchmarks.report import Report

    note = f"Built for and run on {probe['gpu']}, compute capability {probe['capability']}."
    rows = [{"": r.stage, "outcome": r.outcome, "seconds": round(r.seconds, 1), "detail": r.detail} for r in results]
    Report(folder, "gpu", "make gpu").add("all stages", note, rows)


def main() -> int:
    parser = argparse.ArgumentParser(description="Build, test and measure the kernels on this machine's GPU.")
    parser.add_argument("folder", type=Path, help="for the results")
    parser.add_argument("--limit", type=float, default=LIMIT, help="seconds for all stages (default: %(default)g)")
    parser.add_argument("--benchmarks", nargs="*", choices=list(BENCHMARKS), default=list(BENCHMARKS), help="which")
    given = parser.parse_args()
    folder = given.folder.resolve()
    deadline = time.monotonic() + given.limit
    answer = subprocess.run([sys.executable, "-c", PROBE], capture_output=True, text=True)
    if answer.returncode:
        sys.exit(f"gpu: torch cannot be used:\n{answer.stderr}")
    probe: dict[str, str] = json.loads(answer.stdout.splitlines()[-1])
    if not probe["gpu"]:
        sys.exit(f"gpu: torch {probe['torch']} sees no GPU. This needs a machine with one, and a torch with CUDA.")
    print(f"{probe['gpu']}, compute capability {probe['capability']}, torch {probe['torch']}", flush=True)
    variables = environment(probe["capability"], folder)
    folder.mkdir(parents=True, exist_ok=True)
    everything = all_stages(given.benchmarks)
    for name in {stage.log for beside in everything for stage in beside} | {"gpu.json", "gpu.md"}:
        (folder / name).unlink(missing_ok=True)

    results: list[Result] = []
    for beside in everything:
        with ThreadPoolExecutor() as pool:
            results += pool.map(lambda stage: run(stage, folder, variables, deadline), beside)
        if results[0].outcome != "ok":
            break
    try:
        report(folder, results, probe)
        print(f"\n{(folder / 'gpu.md').read_text(encoding='utf-8')}")
    except Exception as error:  # the package may be what is broken
        traceback.print_exc()
        results.append(Result("report", "failed", 0.0, f"{type(error).__name__}: {error}"))
    print(f"\nin {folder}/:")
    width = max(len(result.stage) for result in results)
    for result in results:
        print(f"{result.stage:{width}}  {result.outcome:8}{result.seconds:6.1f} s  {result.detail}")
    return int(any(result.outcome == "failed" for result in results))


if __name__ == "__main__":
    sys.exit(main())
