"""Times attnx on a GPU: `python -m benchmarks.gpu --out FILE`. Needs JAX and NumPy.

Every case runs in a process of its own, so that one that hangs or breaks the GPU's
context costs no other. Rows are saved as they come. With `--jobs` several cases are
compiled at once; still one program is timed at a time.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import functools
import multiprocessing
import os
import pathlib
import re
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import gpu_cases
from benchmarks.cases import Case
from benchmarks.measure import MODES, check, provenance, save

OUT = pathlib.Path(__file__).parent / "results" / "gpu.json"
# Relative root mean square between candidates at the timed size.
AGREEMENT = 1e-2
# A candidate runs for so long, and at most so many times; its results all stay in
# memory until the last.
SECONDS, RUNS, BYTES = 1.0, 20, 8e9
# In so many rounds, as candidates take turns.
ROUNDS = 4


def main() -> None:
    """Times the cases and candidates that the arguments name."""
    parser = argparse.ArgumentParser("python -m benchmarks.gpu", description=__doc__)
    parser.add_argument("--out", type=pathlib.Path, default=OUT)
    parser.add_argument("--op", default="", help="regular expression")
    parser.add_argument("--case", default="", help="regular expression")
    parser.add_argument("--candidate", action="append", help="one of the candidates")
    parser.add_argument("--commit", default="", help="by default git is asked")
    parser.add_argument("--limit", type=float, default=300, help="seconds a case")
    parser.add_argument("--jobs", type=int, default=1, help="cases at once")
    given = parser.parse_args()
    if given.jobs > 1:  # They share the GPU's memory.
        os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    chosen = [
        (index, case.name)
        for index, case in enumerate(gpu_cases.cases())
        if re.search(given.op, case.op) and re.search(given.case, case.name)
    ]
    with tempfile.NamedTemporaryFile() as lock, ThreadPoolExecutor(given.jobs) as pool:

        def start(case: tuple[int, str]) -> None:
            index, name = case
            args = index, given.candidate, given.out, given.commit, lock.name
            _in_a_process(name, given.limit, args)

        # What fails in a thread is raised where its result is asked for.
        list(pool.map(start, chosen))


def _in_a_process(name: str, limit: float, args: tuple) -> None:
    """Calls `run` with these arguments, for so many seconds at most."""
    process = multiprocessing.get_context("spawn").Process(target=run, args=args)
    process.start()
    process.join(limit)
    if process.is_alive():
        process.kill()
        process.join()
        print(f"{name}: stopped after {limit:.0f} s", flush=True)
    elif process.exitcode:
        print(f"{name}: ended with {process.exitcode}", flush=True)


def run(
    index: int,
    candidates: Sequence[str] | None,
    out: pathlib.Path,
    commit: str,
    lock: str,
) -> None:
    """Times the case of this number, saves and prints each row."""
    case = list(gpu_cases.cases())[index]
    where = provenance(commit)
    rows = []
    for row in measure(case, candidates, functools.partial(_holding, lock)):
        rows.append(row)
        with _holding(lock):
            save(out, where, rows)
        print(line(row), flush=True)


def measure(
    case: Case,
    candidates: Sequence[str] | None = None,
    alone: Callable = contextlib.nullcontext,
) -> Iterator[dict]:
    """Times the candidates of a case, by default all. One that fails says why.

    What runs on the device does so in the context that `alone` makes, but for what
    compiling tries out.
    """
    every = {**case.candidates, **case.yardsticks}
    candidates = candidates or [name for name in every if name != "reference"]
    wrong: dict[str, Exception | None] = dict.fromkeys(
        x for x in every if x in candidates
    )
    for name in wrong:
        try:
            if name in case.candidates:
                check(case.small(), [name], alone)
        except Exception as error:
            wrong[name] = error
    with alone():
        arrays = case.arrays()
    programs: dict[tuple[str, str], Callable | Exception] = {}
    for mode in case.modes:
        of_mode: dict[str, Callable | Exception] = {}
        for name, error in wrong.items():
            try:
                if error:
                    raise error
                fn = MODES[mode](every[name])
                of_mode[name] = jax.jit(fn).lower(*arrays).compile()
            except Exception as error:
                of_mode[name] = error
        with alone():
            _agree(case, of_mode, arrays)
        programs |= {(mode, name): program for name, program in of_mode.items()}
    with alone():
        found = timed(programs, arrays)
    for (mode, name), row in found.items():
        yield {
            "op": case.op,
            "case": case.name,
            "candidate": name,
            "mode": mode,
            **row,
        }


@contextlib.contextmanager
def _holding(path: str) -> Iterator[None]:
    """Holds a lock that is free again when its process ends, whatever ends it."""
    with open(path) as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def timed(
    programs: Mapping[Any, Callable | Exception], arrays: Sequence[jax.Array]
) -> dict[Any, dict]:
    """What rows say of compiled programs, of all candidates and modes, in turns.

    A GPU under load slows down as it grows warm: what is timed one after the other
    would not have met the same one.
    """
    rows: dict[Any, dict] = {}
    runs: dict[Any, int] = {}
    for name, program in programs.items():
        try:
            if isinstance(program, Exception):
                raise program
            start = time.perf_counter()
            jax.block_until_ready(program(*arrays))
            seconds = time.perf_counter() - start
            plan = program.memory_analysis()
            most = min(RUNS, SECONDS / seconds, BYTES / plan.output_size_in_bytes)
            runs[name] = max(1, int(most / ROUNDS))
            size = (plan.temp_size_in_bytes + plan.output_size_in_bytes) / 1e6
            rows[name] = {"megabytes": size}
        except Exception as error:
            rows[name] = _failed(error)
    times: dict[Any, list[float]] = {name: [] for name in runs}
    for name in ROUNDS * list(runs):
        try:
            some, rows[name]["timer"] = milliseconds(programs[name], arrays, runs[name])
            times[name] += some
        except Exception as error:
            rows[name] = _failed(error)
    for name, each in times.items():
        if "error" not in rows[name]:
            rows[name] = {
                "milliseconds": statistics.median(each),
                "fastest": min(each),
                "runs": len(each),
                **rows[name],
            }
    return rows


def _failed(error: Exception) -> dict:
    return {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}


def milliseconds(
    program: Callable, arrays: Sequence[jax.Array], runs: int
) -> tuple[list[float], str]:
    """Times a compiled program: in its kernels by CUPTI, else by the host's clock."""
    if jax.devices()[0].platform == "gpu":
        try:
            from jax.experimental.mosaic.gpu import profiler

            _, times = profiler.measure(program, iterations=runs)(*arrays)
            if times:
                return (times if runs > 1 else [times]), "cupti"
        except (ImportError, RuntimeError):
            pass  # No CUPTI, or calls that do not all launch the same kernels.
    return host_milliseconds(program, arrays, runs), "host"


def host_milliseconds(
    program: Callable, arrays: Sequence[jax.Array], runs: int
) -> list[float]:
    """Times a call by the host's clock, so many being on their way at once."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(runs):
            out = program(*arrays)
        jax.block_until_ready(out)
        times.append(1e3 * (time.perf_counter() - start) / runs)
    return times


def line(row: dict) -> str:
    """One row for the terminal."""
    head = f"{row['case']:42} {row['candidate']:12} {row['mode']:17}"
    if "error" in row:
        return f"{head} {row['error']}"
    return f"{head} {row['milliseconds']:9.3f} ms  {row['runs']} by {row['timer']}"


@jax.jit
def _distance(got: jax.Array, wanted: jax.Array) -> jax.Array:
    got, wanted = got.astype(jnp.float32), wanted.astype(jnp.float32)
    return jnp.linalg.norm(got - wanted) / jnp.linalg.norm(wanted)


def _agree(case: Case, programs: dict, arrays: Sequence[jax.Array]) -> None:
    """Puts an error in place of programs that differ from the first."""
    first: tuple[str, object] | None = None
    for name in case.candidates:
        try:
            if isinstance(programs.get(name, KeyError()), Exception):
                continue
            got = programs[name](*arrays)
            other, wanted = first = first or (name, got)
            pairs = zip(jax.tree.leaves(got), jax.tree.leaves(wanted), strict=True)
            worst = max(float(_distance(*pair)) for pair in pairs)
            if not worst <= AGREEMENT:
                raise ValueError(
                    f"relative error {worst:.1e} beside {other}: not timed"
                )
        except Exception as error:
            programs[name] = error


if __name__ == "__main__":
    main()
