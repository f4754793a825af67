"""Timing that first checks: a candidate that is wrong is not timed."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import pathlib
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.cases import Case

# Relative root mean square of an output and of a gradient, against float64.
ERRORS = {"float32": (1e-5, 1e-5), "bfloat16": (4e-3, 8e-3)}
SECONDS = 3.0
# What XLA may plan for a candidate before it is left out. A process that needs more
# than this and its arrays is killed on a machine of 24 GB, and takes the run with it.
MEMORY_BYTES = 16e9


def _backward(fn: Callable) -> Callable:
    def run(*arrays):
        out, pull = jax.vjp(fn, *arrays)
        return out, pull(out)

    return run


# What is timed of a function.
MODES = {"forward": lambda fn: fn, "forward+backward": _backward}


class Row(NamedTuple):
    """One candidate's median of one case, forward or with the backward."""

    op: str
    case: str
    candidate: str
    mode: str
    milliseconds: float
    fastest: float
    runs: int
    megabytes: float


def run(case: Case, names: list[str]) -> Iterator[Row]:
    """Times the named candidates in turns, so that a drift of the machine hits all."""
    check(case.small(), names)
    arrays = case.arrays()
    for mode, wrap in MODES.items():
        compiled, sizes = {}, {}
        for name in names:
            program = jax.jit(wrap(case.candidates[name])).lower(*arrays).compile()
            plan = program.memory_analysis()
            sizes[name] = plan.temp_size_in_bytes + plan.output_size_in_bytes
            if sizes[name] <= MEMORY_BYTES:
                compiled[name] = program
        _agree(case, mode, {name: fn(*arrays) for name, fn in compiled.items()})
        times = {name: [] for name in compiled}
        while due := [name for name, spent in times.items() if _is_due(spent)]:
            for name in due:
                times[name].append(_seconds(compiled[name], arrays))
        for name, spent in times.items():
            yield Row(
                case.op,
                case.name,
                name,
                mode,
                1e3 * statistics.median(spent),
                1e3 * min(spent),
                len(spent),
                sizes[name] / 1e6,
            )


def check(
    case: Case, names: list[str], alone: Callable = contextlib.nullcontext
) -> None:
    """Raises unless candidates match the float64 reference, gradients included.

    All but compiling is done in the context that `alone` makes.
    """
    with alone():
        arrays = case.arrays()

    def run(name, arrays):
        fn = jax.jit(_checked(case, case.candidates[name]))
        program = fn.lower(*arrays).compile()
        with alone():
            return jax.block_until_ready(program(*arrays))

    with jax.enable_x64(True):
        wide = [jnp.asarray(np.asarray(x, np.float64)) for x in arrays]
        wanted = run("reference", wide)
    for name in names:
        got = run(name, arrays)
        for i, (x, y) in enumerate(zip(got, wanted, strict=True)):
            what = f"result {i}" if i else "output"
            bound = ERRORS[case.dtype][min(i, 1)]
            _compare(f"{case.name}: {name}, {what}", x, y, bound)


def provenance(commit: str = "") -> dict[str, str]:
    """Where and with what a result was measured; git is asked for the commit."""
    device = jax.devices()[0]
    versions = {name: _version(name) for name in ("jax", "jaxlib", "attnx")}
    commit = commit or _commit()
    kind = device.device_kind
    if device.platform == "cpu":
        kind = _processor()
    return {
        "platform": device.platform,
        "device": kind,
        "python": platform.python_version(),
        **versions,
        "commit": commit,
    }


def save(path: pathlib.Path, where: dict[str, str], rows: list[dict]) -> None:
    """Adds rows to a file, in place of all earlier ones of their cases and device."""
    path.parent.mkdir(parents=True, exist_ok=True)
    runs = json.loads(path.read_text()) if path.exists() else []
    new = {(row["op"], row["case"]) for row in rows}
    for run in runs:
        if run["device"] == where["device"]:
            run["rows"] = [r for r in run["rows"] if (r["op"], r["case"]) not in new]
    same = [run for run in runs if run == {**where, "rows": run["rows"]}]
    if same:
        same[0]["rows"] += rows
    else:
        runs.append({**where, "rows": rows})
    runs = [run for run in runs if run["rows"]]
    path.write_text(json.dumps(runs, indent=1) + "\n")


def _checked(case: Case, fn: Callable) -> Callable:
    """What is compared: the output, and the gradients where they are timed."""

    def run(*arrays):
        if "forward+backward" not in case.modes:
            return tuple(jax.tree.leaves(fn(*arrays)))
        out, pull = jax.vjp(fn, *arrays)
        # The same numbers for every dtype of `out`.
        weights = jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).astype(case.dtype)
        return out, *pull(weights.astype(out.dtype).reshape(out.shape))

    return run


def _is_due(spent: list[float]) -> bool:
    """Whether a candidate is to run again: twice at least, then for some seconds."""
    return len(spent) < 2 or (sum(spent) < SECONDS and len(spent) < 50)


def _seconds(program: Callable, arrays: list[jax.Array]) -> float:
    start = time.perf_counter()
    jax.block_until_ready(program(*arrays))
    return time.perf_counter() - start


def _agree(case: Case, mode: str, results: dict[str, object]) -> None:
    """At the timed size the candidates agree among themselves."""
    first, *others = results
    for name in others:
        for x, y in zip(
            jax.tree.leaves(results[name]), jax.tree.leaves(results[first]), strict=True
        ):
            what = f"{case.name}, {mode}: {name} beside {first}"
            _compare(what, x, y, ERRORS[case.dtype][0])


def _compare(what: str, got: jax.Array, wanted: jax.Array, bound: float) -> None:
    got, wanted = np.asarray(got, np.float64), np.asarray(wanted, np.float64)
    error = np.linalg.norm(got - wanted) / np.linalg.norm(wanted)
    if not error <= bound:
        raise ValueError(f"{what}: relative error {error:.1e} above {bound}: not timed")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"  # run from a checkout


def _commit() -> str:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return "unknown"
    return done.stdout.strip() or "unknown"


def _processor() -> str:
    try:
        with open("/proc/cpuinfo") as lines:
            models = [
                line.split(":")[1].strip() for line in lines if "model name" in line
            ]
    except OSError:
        return platform.processor() or "unknown processor"
    return f"{models[0]}, {len(models)} cores" if models else "unknown processor"
