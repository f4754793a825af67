"""Pointer networks by name, for an H100: minutes each."""

from __future__ import annotations

import pathlib

from models.pointer.experiment import PointerExperiment
from models.pointer.network import PointerConfig
from models.train import TrainConfig


def _preset(name: str, steps: int, encoder="lstm", **settings) -> PointerExperiment:
    """An experiment with the common sizes and training."""
    return PointerExperiment(
        folder=pathlib.Path("runs") / name,
        model=PointerConfig(encoder),
        training=TrainConfig(
            steps=steps,
            learning_rate=1e-3,
            warmup_steps=1000,
            weight_decay=0.01,
            save_every=5000,
            validate_every=1000,
            steps_per_call=100,
        ),
        **settings,
    )


def _sizes(num_points: int) -> dict[str, tuple[int, ...]]:
    return {"lengths": (num_points, num_points), "test_lengths": (num_points,)}


_RANGE = {"lengths": (5, 50), "test_lengths": (5, 10, 50, 100, 200)}
_BEAM = {"problem": "tsp", "beam_width": 16}
PRESETS = {
    "hull": _preset("hull", 30_000, **_sizes(50)),
    "hull-range": _preset("hull-range", 30_000, **_RANGE),
    "hull-range-attention": _preset(
        "hull-range-attention", 12_000, "attention", **_RANGE
    ),
    "hull-attention": _preset("hull-attention", 4000, "attention", **_sizes(50)),
    "delaunay": _preset("delaunay", 30_000, problem="delaunay", **_sizes(10)),
    "delaunay-5": _preset("delaunay-5", 30_000, problem="delaunay", **_sizes(5)),
    "delaunay-5-attention": _preset(
        "delaunay-5-attention", 4000, "attention", problem="delaunay", **_sizes(5)
    ),
    "delaunay-attention": _preset(
        "delaunay-attention", 6000, "attention", problem="delaunay", **_sizes(10)
    ),
    "tsp": _preset("tsp", 40_000, **_BEAM, **_sizes(10)),
    "tsp-20": _preset("tsp-20", 25_000, **_BEAM, **_sizes(20)),
    "tsp-attention": _preset(
        "tsp-attention", 25_000, "attention", **_BEAM, **_sizes(20)
    ),
}
