"""The committed results as text: `docs/benchmarks.md`."""

from __future__ import annotations

import itertools
import json
import pathlib
from collections.abc import Iterator

DOCS = pathlib.Path(__file__).parents[1] / "docs"
HEAD = """# Benchmarks

Medians of one run each, peers in the same run, after a check against the float64
reference at a small size and of all candidates against each other at the timed one.
Memory is what XLA plans for temporaries and results. `make bench` measures again;
`.venv/bin/python -m benchmarks plot` writes this page and the figure.

"""


def write(results: pathlib.Path) -> pathlib.Path:
    """Writes the page of all results."""
    target = DOCS / "benchmarks.md"
    parts = [HEAD]
    for path in sorted(results.glob("*.json")):
        parts.append(f"![time against length](figures/time-{path.stem}.png)\n")
        for run in json.loads(path.read_text()):
            parts += _run(run)
    target.write_text("\n".join(parts))
    return target


def _run(run: dict) -> Iterator[str]:
    where = ("python", "jax", "attnx", "commit")
    stack = ", ".join(f"{name} {run[name]}" for name in where)
    yield f"\n## {run['device']}\n\n{stack}\n"
    for op, rows in itertools.groupby(run["rows"], lambda row: row["op"]):
        yield f"### `{op}`\n"
        yield "| case | mode | candidate | ms | of attnx | MB |"
        yield "|---|---|---|--:|--:|--:|"
        rows = list(rows)
        ours = {
            (row["case"], row["mode"]): row["milliseconds"]
            for row in rows
            if row["candidate"] == "xla"
        }
        for row in rows:
            name = "attnx xla" if row["candidate"] == "xla" else row["candidate"]
            ratio = row["milliseconds"] / ours[row["case"], row["mode"]]
            yield (
                f"| {row['case']} | {row['mode']} | {name} "
                f"| {row['milliseconds']:.1f} | {ratio:.2f}x | {row['megabytes']:.0f} |"
            )
        yield ""
