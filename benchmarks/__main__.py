"""Times attnx beside what else there is, and draws the figures."""

from __future__ import annotations

import itertools
import pathlib
from typing import Annotated

import tyro
from rich.console import Console
from rich.table import Table

from benchmarks import measure, report
from benchmarks import plot as figures
from benchmarks.cases import Case, cases

RESULTS = pathlib.Path(__file__).parent / "results"
Names = Annotated[tuple[str, ...], tyro.conf.UseAppendAction]


def main() -> None:
    """Runs the command that the arguments name."""
    tyro.extras.subcommand_cli_from_dict(
        {"run": time, "plot": draw}, prog="python -m benchmarks", description=__doc__
    )


def time(
    op: Names = (),
    case: str = "",
    implementation: Names = (),
    peer: Names = (),
    save: bool = True,
) -> None:
    """Time every case, or those named. A candidate that is wrong is not timed.

    Args:
      op: mechanisms, all by default.
      case: only cases whose name holds this text.
      implementation: of attnx; by default all but the reference.
      peer: candidates beside attnx, all by default.
      save: keep the results in benchmarks/results.
    """
    where = measure.provenance()
    if where["platform"] == "gpu":
        raise SystemExit("On a GPU other cases are timed: python -m benchmarks.gpu")
    console = Console()
    console.print(", ".join(f"{key} {value}" for key, value in where.items()))
    rows = []
    for each in cases():
        if (op and each.op not in op) or case not in each.name:
            continue
        names = _candidates(each, implementation, peer)
        with console.status(f"{each.op}: {each.name}"):
            timed = list(measure.run(each, names))
        console.print(_table(each, timed))
        rows += [row._asdict() for row in timed]
        if save:
            measure.save(RESULTS / f"{where['platform']}.json", where, rows)


def draw() -> None:
    """Write the figures and tables of docs/ from the results in benchmarks/results."""
    drawn = list(figures.draw(RESULTS))
    for path in (*drawn, report.write(RESULTS, drawn)):
        print(path)


def _candidates(
    case: Case, implementations: tuple[str, ...], peers: tuple[str, ...]
) -> list[str]:
    ours = ("reference", "xla", "pallas")
    implementations = implementations or ours[1:]
    theirs = peers or tuple(name for name in case.candidates if name not in ours)
    return [name for name in case.candidates if name in implementations + theirs]


def _table(case: Case, rows: list) -> Table:
    table = Table(title=f"{case.op}: {case.name}", title_justify="left")
    for column in ("candidate", "mode", "median ms", "fastest", "runs", "MB", "of xla"):
        table.add_column(column, justify="right")
    for mode, group in itertools.groupby(rows, lambda row: row.mode):
        group = list(group)
        ours = {row.candidate: row.milliseconds for row in group}.get("xla")
        for row in group:
            ratio = f"{row.milliseconds / ours:.2f}" if ours else ""
            table.add_row(
                row.candidate,
                mode,
                f"{row.milliseconds:.1f}",
                f"{row.fastest:.1f}",
                str(row.runs),
                f"{row.megabytes:.0f}",
                ratio,
            )
    return table


if __name__ == "__main__":
    main()
