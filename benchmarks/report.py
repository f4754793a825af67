"""The committed results as text: `docs/benchmarks.md`."""

from __future__ import annotations

import itertools
import json
import pathlib
from collections.abc import Iterable, Iterator

DOCS = pathlib.Path(__file__).parents[1] / "docs"
HEAD = """# Benchmarks

Medians of one run each, peers in the same run, after a check against the float64
reference at a small size and of all candidates against each other at the timed one.
Memory is what XLA plans for temporaries and results. `make bench` measures again;
`.venv/bin/python -m benchmarks plot` writes this page and the figures.

"""
CAPTIONS = {
    "time-gpu": "time beside peers",
    "length-gpu": "time per token of linear attention against length",
    "sparsity-gpu": "speed-up against the share of blocks visited",
}
GPU = """
Times are those of a call's kernels, as CUPTI reports them, unless marked "host": those
hold the launches as well. A candidate without a time says why. "copy" reads and writes
together the bytes that attention must read; of linear attention, those that it reads
and writes.
"""


def write(results: pathlib.Path, figures: Iterable[pathlib.Path]) -> pathlib.Path:
    """Writes the page of all results, with those figures that are a platform's."""
    target = DOCS / "benchmarks.md"
    figures = list(figures)
    parts = [HEAD]
    for path in sorted(results.glob("*.json")):
        for figure in figures:
            kind, _, platform = figure.stem.partition("-")
            if platform == path.stem:
                words = CAPTIONS.get(figure.stem, f"{kind} against length")
                parts.append(f"![{words}](figures/{figure.name})\n")
        for run in json.loads(path.read_text()):
            parts += _run(run)
    target.write_text("\n".join(parts))
    return target


def _run(run: dict) -> Iterator[str]:
    where = ("python", "jax", "attnx", "commit")
    stack = ", ".join(f"{name} {run[name]}" for name in where)
    yield f"\n## {run['device']}\n\n{stack}\n"
    if note := run.get("note"):  # Of whoever measured.
        yield f"{note}\n"
    on_gpu = run["platform"] == "gpu"
    if on_gpu:
        yield GPU
    for op, rows in itertools.groupby(run["rows"], lambda row: row["op"]):
        yield f"### `{op}`\n"
        yield "| case | mode | candidate | ms | of attnx | MB |"
        yield "|---|---|---|--:|--:|--:|"
        rows = list(rows)
        cases = list(dict.fromkeys(row["case"] for row in rows))
        rows.sort(key=lambda row: (cases.index(row["case"]), row["mode"]))
        ours = {}
        for name in ("xla", "pallas"):  # the last there is
            for row in rows:
                if row["candidate"] == name and "milliseconds" in row:
                    ours[row["case"], row["mode"]] = row["milliseconds"]
        for row in rows:
            name = row["candidate"]
            name = f"attnx {name}" if name in ("reference", "xla", "pallas") else name
            head = f"| {row['case']} | {row['mode']} | {name} "
            if "error" in row:
                yield f"{head}| {row['error'].replace('|', ' ')} | | |"
                continue
            time = row["milliseconds"]
            base = ours.get((row["case"], row["mode"]))
            ratio = f"{time / base:.2f}x" if base else ""
            clock = " (host)" if on_gpu and row["timer"] == "host" else ""
            number = f"{time:.3f}" if on_gpu else f"{time:.1f}"
            size = f"{row['megabytes']:.0f}" if "megabytes" in row else ""
            yield f"{head}| {number}{clock} | {ratio} | {size} |"
        yield ""
