"""The picture of a run."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from models.train import read_metrics


def plot(
    folder: pathlib.Path, marks: Mapping[str, float], unit: str = "nats per byte"
) -> pathlib.Path:
    """Draws a run's loss curve beside horizontal marks.

    Args:
      folder: of the run, with its `metrics.jsonl`.
      marks: heights by name.
      unit: of the loss.

    Returns:
      Where the PNG is.
    """
    lines = read_metrics(folder)
    steps = np.array([line["step"] for line in lines])
    losses = np.array([line["loss"] for line in lines])
    validation = [(x["step"], x["validation"]) for x in lines if "validation" in x]

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(steps, losses, color="tab:blue", alpha=0.25, linewidth=0.8)
    axes.plot(steps, _smooth(losses), color="tab:blue", label="training")
    axes.plot(*zip(*validation, strict=True), "o-", color="tab:red", label="validation")
    lowest = min([*marks.values(), *losses])
    axes.set(xlabel="step", ylabel=unit, ylim=(lowest - 0.15, min(losses.max(), 4)))
    _mark(axes, marks)
    axes.legend(loc="upper right", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    path = folder / "loss.png"
    figure.savefig(path, dpi=150)
    return path


def _mark(axes: Axes, marks: Mapping[str, float]) -> None:
    """Draws each mark as a line, named to its right; no name over another."""
    low, high = axes.get_ylim()
    free = low
    for name, height in sorted(marks.items(), key=lambda mark: mark[1]):
        axes.axhline(height, color="0.6", linestyle="--", linewidth=0.8, zorder=0)
        free = max(free + (high - low) / 22, height)
        axes.annotate(
            f"{name} {height:.3f}",
            (1, height),
            (1.02, free),
            xycoords=("axes fraction", "data"),
            textcoords=("axes fraction", "data"),
            arrowprops={"arrowstyle": "-", "color": "0.6", "linewidth": 0.5},
            va="center",
            fontsize=8,
            color="0.3",
        )


def _smooth(values: np.ndarray, window: int = 25) -> np.ndarray:
    """The mean of the last `window` values, or of as many as there are."""
    sums = np.cumsum(np.insert(values, 0, 0.0))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(ends - window, 0)
    return (sums[ends] - sums[starts]) / (ends - starts)
