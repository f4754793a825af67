"""Results that are kept in the repository, and the page that shows them."""

from __future__ import annotations

import json
import math
import pathlib
import textwrap
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from models import runs, speed
from models.anchors import ANCHORS
from models.train import read_metrics

RESULTS = pathlib.Path(__file__).parent / "results"
DOCS = pathlib.Path(__file__).parents[1] / "docs"


class Target(NamedTuple):
    """A measure of an experiment to show, and the bound that it should keep, if any."""

    measure: str
    at_least: float = -math.inf
    at_most: float = math.inf

    def __str__(self) -> str:
        if self.at_least > -math.inf:
            return f"{self.measure} at least {self.at_least}"
        if self.at_most < math.inf:
            return f"{self.measure} at most {self.at_most}"
        return "none"

    def reached(self, value: float) -> bool:
        return self.at_least <= value <= self.at_most


class Section(NamedTuple):
    """Experiments that are measured alike: of each, what it should reach."""

    title: str
    words: str
    targets: dict[str, Target]


_LOSS = Target("nats per byte", at_most=1.20)
# Three percent above the transformer's.
_NEAR_LOSS = Target("nats per byte", at_most=1.236)
_NEAR_LAST = Target("nats of the last byte", at_most=1.236)
_ANY_LOSS = Target("nats per byte")
SECTIONS = (
    Section(
        "King James Bible",
        "Nats per byte of the last tenth of the text, the rest of which was learned "
        "from; at most ten million parameters. Marks: "
        + ", ".join(f"{name} {value}" for name, value in ANCHORS.items())
        + ". The last byte is that of a window of 1024: nothing follows it. Which "
        "tokens share a cluster of `routing` depends on the whole window; what `moba` "
        "chooses does not. `moh` activates nine of the twelve heads that `moh-dense` "
        "has.",
        {
            "transformer": _LOSS,
            "tnl": _NEAR_LOSS,
            "based": _NEAR_LOSS,
            "hybrid": _LOSS,
            "moh-dense": _LOSS,
            "moh": _LOSS,
            "moh-continued": _ANY_LOSS,
            "gated-linear": _ANY_LOSS,
            "hybrid-window": _ANY_LOSS,
            "window": _ANY_LOSS,
            "power": _ANY_LOSS,
            "moba": _NEAR_LOSS,
            "routing": _NEAR_LAST,
        },
    ),
    Section(
        "Handwritten digits",
        "Accuracy on a fifth of each class, drawn by scikit-learn's "
        "`train_test_split(test_size=0.2, stratify=labels, random_state=0)`: 360 of "
        "the 1797 digits of 8x8 pixels, 1000 of the 5000 of MNIST. On the same split "
        "logistic regression reaches 0.967 and 0.896, a support vector machine with a "
        "Gaussian kernel 0.994 and 0.954. The model is that of the last step: none is "
        "chosen by what it makes of these images.",
        {
            "digits-vit": Target("accuracy", at_least=0.975),
            "digits-nat": Target("accuracy", at_least=0.975),
            "mnist-vit": Target("accuracy", at_least=0.97),
            "mnist-nat": Target("accuracy", at_least=0.97),
        },
    ),
    Section(
        "Associative recall",
        "Accuracy of the values named by queries in 5120 sequences that hold 4 to 64 "
        "pairs of key and value in 256 tokens, out of a vocabulary of 8192: the task "
        "of Zoology (arXiv:2312.04927) and Based. All have two layers of a short "
        "convolution and the mixer, D = 64. Plain linear attention should fall short "
        "where pairs are many.",
        {
            "recall-softmax": Target("accuracy", at_least=0.99),
            "recall-based": Target("accuracy", at_least=0.95),
            "recall-linear": Target("accuracy, 64 pairs", at_most=0.9),
        },
    ),
    Section(
        "Pointer networks",
        "1000 sets of points that training did not draw, answered by beam search, "
        "beside exact answers. Vinyals et al. (2015) reach 0.726 of hulls of 50 points "
        "and, trained on 5 to 50, 0.503 of those of 100; 0.807 and 0.226 of Delaunay "
        "triangulations of 5 and 10. Of tours: how much longer than the shortest the "
        "best of the beam is. Covered areas are of the outputs that are polygons.",
        {
            "hull": Target("sequence accuracy, 50 points", at_least=0.726),
            "hull-attention": Target("sequence accuracy, 50 points", at_least=0.726),
            "hull-range": Target("sequence accuracy, 100 points", at_least=0.503),
            "hull-range-attention": Target(
                "sequence accuracy, 100 points", at_least=0.503
            ),
            "delaunay-5": Target("sequence accuracy, 5 points", at_least=0.807),
            "delaunay": Target("sequence accuracy, 10 points", at_least=0.226),
            "delaunay-attention": Target(
                "sequence accuracy, 10 points", at_least=0.226
            ),
            "tsp": Target("excess of the shortest, 10 points", at_most=0.01),
            "tsp-20": Target("excess of the shortest, 20 points", at_most=0.03),
            "tsp-attention": Target("excess of the shortest, 20 points", at_most=0.03),
        },
    ),
    Section(
        "Needles at a distance",
        "Accuracy of values that a token named up to 1024 tokens back, the mean over "
        "eight ranges of distance. A passkey is one value of sixteen (chance 0.063), "
        "for six layers that see blocks at powers of two (PowerAttention, "
        "arXiv:2503.03588), or a window of as many keys, 62 in the mean, which reach "
        "366 back. Needles are eight, each of eight values (chance 0.125), for a layer "
        "of short memory below one of attention: Superlinear (arXiv:2601.18401), a "
        "window of as many keys, or dense.",
        {
            "passkey-power": Target("accuracy", at_least=0.9),
            "passkey-window": Target("accuracy, 896 to 1024 back", at_most=0.1),
            "needle-superlinear": Target("accuracy", at_least=0.9),
            "needle-window": Target("accuracy, 896 to 1024 back", at_most=0.2),
            "needle-dense": Target("accuracy", at_least=0.99),
        },
    ),
)
HEAD = """# Results of the models

What each experiment should reach and what it did. `python -m models train NAME` trains,
`python -m models eval NAME --record` measures on the data held out and keeps the result
in `models/results`, and `python -m models results` writes this page from there.
Minutes are those of training, compilation included.
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
                lines += [_reached(target, result) for result in results]
            else:
                command = f"`python -m models train {name}`"
                lines.append(_row(name, target, "not run yet", "", "", "", "", command))
        lines.append("")
    lines += _chunks(read("chunks.json"))
    return "\n".join([*lines, *_speed(read("speed-*.json"))]) + "\n"


def _reached(target: Target, result: dict[str, Any]) -> str:
    value = result["measures"][target.measure]
    missed = "" if target.reached(value) else ", missed"
    others = [
        f"{name} {other:.3f}"
        for name, other in result["measures"].items()
        if name != target.measure
    ]
    return _row(
        f"[{result['experiment']}](../models/results/{result['path'].name})",
        target,
        f"{value:.3f}{missed}",
        "; ".join(others),
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
