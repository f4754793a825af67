"""The picture of what a pointer network answers."""

from __future__ import annotations

import pathlib

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from models.pointer.experiment import PointerExperiment, held_out_points
from models.pointer.network import PointerNetwork
from models.pointer.problems import PROBLEMS


def draw_answers(
    experiment: PointerExperiment, model: PointerNetwork, num_sets: int = 4
) -> pathlib.Path:
    """Draws answers over the exact ones, for the largest sets that it was trained on.

    Args:
      experiment: whose folder gets the picture.
      model: trained.
      num_sets: point sets, a panel each.

    Returns:
      Where the PNG is.
    """
    problem = PROBLEMS[experiment.problem]
    points = held_out_points(num_sets, experiment.lengths[1])
    figure = Figure(figsize=(3 * num_sets, 3.3), layout="constrained")
    panels = figure.subplots(1, num_sets, squeeze=False)[0]
    answers = experiment.answer(model, points)
    for axes, places, outputs in zip(panels, points, answers, strict=True):
        truth = problem.solve(places)
        measures = problem.measure(places, outputs, truth)
        _outline(axes, places, problem.polygons(truth), color="0.75", linewidth=4)
        _outline(
            axes, places, problem.polygons(outputs[0]), color="tab:red", linewidth=1.2
        )
        axes.plot(*places.T, ".", color="black", markersize=4)
        name, value = next(iter(measures.items()))
        axes.set_title(f"{name} {value:.3f}", fontsize=9)
        axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), xticks=[], yticks=[])
        axes.set_aspect("equal")
    path = experiment.folder / "answers.png"
    figure.savefig(path, dpi=150)
    return path


def _outline(
    axes: Axes, points: np.ndarray, polygons: list[np.ndarray], **style
) -> None:
    for polygon in polygons:
        axes.plot(*points[[*polygon, *polygon[:1]]].T, **style)
