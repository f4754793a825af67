"""Results that are kept in the repository, and the page that shows them."""

from __future__ import annotations

import json
import pathlib
import textwrap
from collections.abc import Iterator
from typing import Any

import numpy as np

from models import runs, speed
from models.targets import SECTIONS, Target
from models.train import read_metrics

RESULTS = pathlib.Path(__file__).parent / "results"
DOCS = pathlib.Path(__file__).parents[1] / "docs"
HEAD = """# Results of the models

What each experiment should reach and what it did. `python -m models train NAME` trains,
`python -m models eval NAME --record` measures on the data held out and keeps the result
in `models/results`, and `python -m models results` writes this page from there.
Minutes are those of training, compilation included; on GPUs several runs shared one.
"""
COLUMNS = (
    "experiment",
    "target",
    "reached",
    "also measured",
    "seed",
    "minutes",
    "where",
    "command",
)


def record(name: str, experiment: Any, measures: dict[str, float], commit: str) -> None:
    """Keeps what a finished run reached.

    Args:
      name: the experiment's.
      experiment: the run's, its `folder` included.
      measures: what `experiment.evaluate` gave.
      commit: of the code that trained, where git could not say so then; or empty.

    Raises:
      RunError: the run is not finished.
    """
    lines = read_metrics(experiment.folder)
    steps = experiment.training.steps
    if len(lines) < steps:
        raise runs.RunError(
            f"{experiment.folder}: only {len(lines)} of {steps} steps are done; train "
            "on first."
        )
    tokens, seed = experiment.task().tokens, experiment.training.seed
    seconds = sum(tokens / line["tokens_per_second"] for line in lines)
    origin = runs.origin(experiment.folder)
    result = {
        "experiment": name,
        "seed": seed,
        **origin,
        "commit": commit or origin["commit"],
        "minutes": round(seconds / 60, 2),
        "measures": {key: round(value, 5) for key, value in measures.items()},
        "config": runs.settings(experiment),
    }
    keep(f"{name}-seed{seed}", result)


def keep(stem: str, result: dict[str, Any]) -> None:
    """Writes a result among those of the repository."""
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / f"{stem}.json").write_text(json.dumps(result, indent=1) + "\n")


def read(pattern: str) -> list[dict[str, Any]]:
    """Reads the results whose file has such a name, in order, with its `path`."""
    paths = sorted(RESULTS.glob(pattern))
    return [{**json.loads(path.read_text()), "path": path} for path in paths]


def write() -> Iterator[pathlib.Path]:
    """Writes the page and its figure; says where."""
    path = DOCS / "results.md"
    path.write_text(page())
    yield path
    speeds = read("speed-*.json")
    if speeds:
        yield speed.plot(speeds, DOCS / "figures" / "speed.png")


def page() -> str:
    """What docs/results.md should say."""
    found = read("*-seed*.json")
    lines = [HEAD]
    for section in SECTIONS:
        lines += [f"## {section.title}", "", textwrap.fill(section.words, 88), ""]
        lines += [_row(*COLUMNS), _row(*["---"] * len(COLUMNS))]
        for name, target in section.targets.items():
            results = [each for each in found if each["experiment"] == name]
            if results:
                lines += [_reached(target, result, found) for result in results]
            else:
                command = f"`python -m models train {name}`"
                lines.append(_row(name, target, "not run yet", "", "", "", "", command))
        lines.append("")
    lines += _chunks(read("chunks.json"))
    return "\n".join([*lines, *_speed(read("speed-*.json"))]) + "\n"


def _reached(
    target: Target, result: dict[str, Any], every: list[dict[str, Any]]
) -> str:
    measures, unit = result["measures"], 1.0
    if target.of:
        others = [each for each in every if each["experiment"] == target.of]
        # A bound that nothing has set yet is reached by nothing.
        units = [x["measures"].get(target.measure, np.nan) for x in others]
        unit = np.mean(units) if units else np.nan
    reached = "not measured"
    if target.measure in measures:
        value = measures[target.measure]
        missed = "" if target.reached(value, unit) else ", missed"
        reached = f"{value:.3f}{missed}"
    more = [
        f"{name} {other:.3f}"
        for name, other in result["measures"].items()
        if name != target.measure
    ]
    return _row(
        f"[{result['experiment']}](../models/results/{result['path'].name})",
        target,
        reached,
        "; ".join(more),
        result["seed"],
        f"{result['minutes']:.1f}",
        _where(result),
        f"`{result['command']}`",
    )


def _chunks(results: list[dict[str, Any]]) -> Iterator[str]:
    yield "## Chunks that follow the text"
    yield ""
    yield textwrap.fill(
        "Share of the mass of dense attention that DHSA (arXiv:2510.24606) keeps on a "
        "budget of keys, with chunks of equal size, chunks that start where mean keys "
        "before and after differ most, and the true segments. Keys and queries of 2048 "
        "tokens are drawn, of topics in segments of 8 to 140 tokens; nothing is "
        "trained. Mean over seeds, and the least and the most.",
        88,
    )
    yield ""
    if not results:
        yield "Not run yet: `python -m models chunks`."
    for result in results:
        ways = result["shares"]
        budgets = list(next(iter(ways.values())))
        heads = [f"{budget} keys" for budget in budgets]
        yield _row("chunks", *heads, "seeds", "where", "command")
        yield _row("---", *["--:"] * len(heads), "---", "---", "---")
        for way, shares in ways.items():
            cells = [
                f"{np.mean(each):.3f} ({min(each):.3f} to {max(each):.3f})"
                for each in shares.values()
            ]
            link = f"[{way}](../models/results/{result['path'].name})"
            seeds = ", ".join(map(str, result["seeds"]))
            yield _row(link, *cells, seeds, _where(result), f"`{result['command']}`")
    yield ""


def _speed(results: list[dict[str, Any]]) -> Iterator[str]:
    yield "## Generation"
    yield ""
    yield "Milliseconds a step of generation against the tokens before it."
    yield ""
    if not results:
        names = " ".join(speed.DEFAULT)
        yield f"Not run yet: `python -m models speed {names}`."
        return
    contexts = sorted({int(c) for each in results for c in each["milliseconds"]})
    heads = [f"{context:,}" for context in contexts]
    yield _row("experiment", "sequences", *heads, "where", "command")
    yield _row("---", "--:", *["--:"] * len(heads), "---", "---")
    for result in results:
        times = [result["milliseconds"].get(str(context)) for context in contexts]
        yield _row(
            f"[{result['experiment']}](../models/results/{result['path'].name})",
            result["batch_size"],
            *("" if time is None else f"{time:.2f}" for time in times),
            _where(result),
            f"`{result['command']}`",
        )
    yield ""
    yield "![Milliseconds a step against context](figures/speed.png)"


def _where(result: dict[str, Any]) -> str:
    return f"{result['device']}, jax {result['jax']}, {result['commit']}"


def _row(*cells: Any) -> str:
    return f"| {' | '.join(map(str, cells))} |"
