"""Run all native operators of the CPU library under sanitizers: for memory, undefined behavior and threads.

python tools/sanitize.py address thread

The sanitized libraries lie in build/sanitize/, each in a copy of the package; the installed one stays as it is. A run
is believed only if the same sanitizer, in the same library, finds the mistakes of tools/sanitizers/planted.cpp. Needs
GCC and, for setarch, Linux.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
HERE = ROOT / "tools" / "sanitizers"
BUILD = ROOT / "build" / "sanitize"
TORCH = Path(torch.__file__).parent
FOUND = 99  # the exit status of a program in which a sanitizer has found something


@dataclass(frozen=True)
class Sanitizer:
    """What to compile with, what to load first, how it is told what to do, and which planted mistakes it finds."""

    flags: tuple[str, ...]
    library: str
    options: dict[str, str]
    finds: dict[str, str]  # names of the mistakes, and words of the reports
    threads: int  # of torch
    sources: tuple[Path, ...] = ()


SANITIZERS = {
    "address": Sanitizer(
        flags=("-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"),
        library="libasan.so",
        options={
            # Python leaks on purpose, as it ends.
            "ASAN_OPTIONS": f"detect_leaks=0:exitcode={FOUND}",
            "UBSAN_OPTIONS": f"print_stacktrace=1:exitcode={FOUND}",
        },
        finds={"overflow": "heap-buffer-overflow", "undefined": "signed integer overflow"},
        threads=4,
    ),
    "thread": Sanitizer(
        flags=("-fsanitize=thread",),
        library="libtsan.so",
        options={"TSAN_OPTIONS": f"exitcode={FOUND}"},
        finds={"race": "data race"},
        threads=1,  # else the sanitizer takes what torch does by OpenMP for races; the library has threads of its own
        sources=(HERE / "threads.cpp",),
    ),
}


def build(sanitizer: Sanitizer, sources: list[Path], library: Path) -> None:
    """Compile `sources` and link them into `library`, unless it is newer than all that it is made of."""
    sources = [*sources, HERE / "planted.cpp", *sanitizer.sources]
    inputs = [*sources, *(ROOT / "csrc").rglob("*.h"), Path(__file__)]
    if library.exists() and library.stat().st_mtime > max(path.stat().st_mtime for path in inputs):
        return
    library.parent.mkdir(parents=True, exist_ok=True)
    objects = [library.parent / f"{source.stem}.o" for source in sources]
    # As setup.py compiles them, but for the level of optimization, so that a report names the right lines.
    options = ["-std=c++17", "-O1", "-g", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno"]
    options += ["-Wno-psabi", "-DTORCH_TARGET_VERSION=0x020b000000000000ULL", "-DPy_LIMITED_API=0x030a0000"]
    options += ["-isystem", f"{TORCH}/include", "-isystem", sysconfig.get_path("include"), *sanitizer.flags]

    def compile_(source: Path, output: Path) -> None:
        subprocess.run(["g++", "-c", *options, str(source), "-o", str(output)], check=True)

    with ThreadPoolExecutor(int(os.environ.get("MAX_JOBS") or os.cpu_count() or 1)) as pool:
        list(pool.map(compile_, sources, objects))
    # -Bsymbolic: calls of parallel_for are to that of threads.cpp, where it is linked.
    link = ["g++", "-shared", "-Wl,-Bsymbolic", *sanitizer.flags, *map(str, objects)]
    subprocess.run([*link, f"-L{TORCH}/lib", "-ltorch_cpu", "-lc10", "-o", str(library)], check=True)


def run(sanitizer: Sanitizer, arguments: list[str], path: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run Python under a sanitizer, with `path` as PYTHONPATH; return its status and what it printed."""
    # libstdc++ too: the sanitizers look for its functions as the program starts, and Python has not loaded it then.
    preload = [
        subprocess.check_output(["gcc", f"-print-file-name={name}"], text=True).strip()
        for name in (sanitizer.library, "libstdc++.so.6")
    ]
    own = {"LD_PRELOAD": " ".join(preload), "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **sanitizer.options}
    # Without random addresses, of which ThreadSanitizer leaves some to itself.
    command = ["setarch", "--addr-no-randomize", sys.executable, *arguments]
    return subprocess.run(command, env={**os.environ, **own, **variables}, capture_output=True, text=True, cwd=BUILD)


def finds_planted(sanitizer: Sanitizer, library: Path) -> bool:
    """Return whether the sanitizer finds each of the planted mistakes in a library, and says that nothing else is."""
    load = f"import torch; torch.ops.load_library({str(library)!r}); x = torch.ones(37); "
    for name, words in sanitizer.finds.items():
        done = run(sanitizer, ["-c", f"{load}torch.ops.curveball_planted.{name}(x)"], "")
        if done.returncode != FOUND or words not in done.stderr:
            print(f"the planted mistake {name!r} was not found:\n{done.stdout}{done.stderr}", flush=True)
            return False
    done = run(sanitizer, ["-c", load], "")
    if done.returncode:
        print(f"something was found where there is nothing:\n{done.stdout}{done.stderr}", flush=True)
    return not done.returncode


def check(kind: str) -> bool:
    """Build the library with a sanitizer, run all operators in it, and return whether nothing was found."""
    sanitizer, package = SANITIZERS[kind], BUILD / kind / "curveball_fused"
    start = time.monotonic()
    shutil.copytree(ROOT / "curveball_fused", package, ignore=shutil.ignore_patterns("*.so"), dirs_exist_ok=True)
    build(sanitizer, sorted((ROOT / "csrc" / "cpu").glob("*.cpp")), package / "_C.abi3.so")
    print(f"{kind}: built in {time.monotonic() - start:.0f} s", flush=True)
    if not finds_planted(sanitizer, package / "_C.abi3.so"):
        return False
    print(f"{kind}: finds {', '.join(sanitizer.finds)}", flush=True)
    for instructions in instruction_sets():
        start = time.monotonic()
        exercise = [str(HERE / "exercise.py"), str(sanitizer.threads)]
        done = run(sanitizer, exercise, f"{package.parent}:{ROOT}", CURVEBALL_INSTRUCTION_SET=instructions)
        if done.returncode:
            print(f"{kind}, {instructions}: exit status {done.returncode}\n{done.stdout}{done.stderr}", flush=True)
            return False
        print(f"{kind}, {instructions}: {done.stdout.strip()}, in {time.monotonic() - start:.0f} s", flush=True)
    return True


def instruction_sets() -> list[str]:
    """Return the names of this processor's instruction sets, of which the library has loops of their own."""
    widest = torch.backends.cpu.get_cpu_capability().lower()
    known = ["default", "avx2", "avx512"]
    return known[: known.index(widest) + 1] if widest in known else ["default"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("kinds", nargs="+", choices=SANITIZERS)
    if not all(check(kind) for kind in parser.parse_args().kinds):
        sys.exit(1)


if __name__ == "__main__":
    main()
