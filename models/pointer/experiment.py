"""Learning to solve a problem of points: data, loss and measures."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from attnx._checks import expect
from models.pointer.network import PointerConfig, PointerNetwork
from models.pointer.problems import PROBLEMS, Problem
from models.pointer.search import log_likelihood, search
from models.train import Task, TrainConfig

_VALIDATION_SIZE = 512
_CHUNK = 250  # point sets that are searched at once


@dataclasses.dataclass(frozen=True)
class PointerExperiment:
    """A pointer network that learns from point sets drawn anew at every step.

    Attributes:
      folder: of the run.
      problem: its name among `PROBLEMS`.
      model: the network.
      training: how it is trained.
      lengths: the fewest and the most points of a set, drawn uniformly between.
      batch_size: point sets a step.
      test_lengths: points of the sets to measure.
      test_size: sets of each.
      beam_width: when measuring.

    Raises:
      ValueError: no such problem, or lengths that are none.
      NotImplementedError: lengths that differ, for `tsp`.
    """

    folder: pathlib.Path = pathlib.Path("runs/hull")
    problem: Literal["hull", "delaunay", "tsp"] = "hull"
    model: PointerConfig = dataclasses.field(default_factory=PointerConfig)
    training: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    lengths: tuple[int, int] = (50, 50)
    batch_size: int = 512
    test_lengths: tuple[int, ...] = (50,)
    test_size: int = 1000
    beam_width: int = 4

    def __post_init__(self):
        expect(self.problem in PROBLEMS, "problem", " or ".join(PROBLEMS), self.problem)
        fewest, most = self.lengths
        expect(3 <= fewest <= most, "lengths", "two numbers from 3 up", self.lengths)
        if fewest < most and not PROBLEMS[self.problem].any_length:
            raise NotImplementedError(
                f"lengths: labels of {self.problem} need sets of one size"
            )

    def task(self) -> Task[PointerNetwork]:
        held_out = np.uint32(2**32 - 1)  # no step gets as far
        validation = jax.jit(self._draw, static_argnums=1)(held_out, _VALIDATION_SIZE)
        validate = jax.jit(self._loss)
        return Task(
            model=functools.partial(_build, self.model),
            batch=np.uint32,
            loss=lambda model, step: self._loss(
                model, self._draw(step, self.batch_size)
            ),
            validate=lambda model: float(validate(model, validation)),
            tokens=self.batch_size * self._problem.max_symbols(self.lengths[1]),
            unit="nats per symbol",
        )

    def evaluate(self, model: PointerNetwork) -> dict[str, float]:
        """Measures a model on sets that were not trained on, with exact answers.

        Returns:
          Means over the sets of each length, of those that have the measure.
        """
        measures = {}
        for length in self.test_lengths:
            points = held_out_points(self.test_size, length)
            rows = [
                self._problem.measure(x, outputs, self._problem.solve(x))
                for x, outputs in zip(points, self.answer(model, points), strict=True)
            ]
            for name in rows[0]:
                values = np.array([row[name] for row in rows])
                values = values[~np.isnan(values)]
                mean = values.mean() if len(values) else np.nan
                measures[f"{name}, {length} points"] = float(mean)
        return measures

    def answer(
        self, model: PointerNetwork, points: np.ndarray
    ) -> list[list[np.ndarray]]:
        """Solves point sets `[B, n, 2]` by beam search.

        Returns:
          For each set the sequences of the beam, likeliest first: indices of points.
        """
        return [
            [
                cut_at_end(symbols)
                for symbols, likely in zip(*hypotheses, strict=True)
                if np.isfinite(likely)
            ]
            for i in range(0, len(points), _CHUNK)
            for hypotheses in zip(
                *self._search(model, points[i : i + _CHUNK]), strict=True
            )
        ]

    @property
    def _problem(self) -> Problem:
        return PROBLEMS[self.problem]

    def _search(self, model, points):
        batch, n, _ = points.shape
        found = search(
            model,
            jnp.asarray(points),
            jnp.full(batch, n),
            self._problem.max_symbols(n),
            width=self.beam_width,
            allowed=self._problem.allowed,
        )
        return jax.tree.map(np.asarray, tuple(found))

    def _draw(self, step, batch_size: int):
        """Makes the batch of a step on the device: points, lengths and labels."""
        key = jax.random.fold_in(jax.random.key(self.training.seed), step)
        place, size = jax.random.split(key)
        fewest, most = self.lengths
        points = jax.random.uniform(place, (batch_size, most, 2))
        lengths = jax.random.randint(size, (batch_size,), fewest, most + 1)
        valid = jnp.arange(most) < lengths[:, None]
        return points, lengths, jax.vmap(self._problem.label)(points, valid)

    def _loss(self, model: PointerNetwork, batch) -> jax.Array:
        """Mean cross-entropy of the labels' symbols, the end included."""
        points, lengths, symbols = batch
        likelihood = log_likelihood(
            model, points, lengths, symbols, self._problem.allowed
        )
        return -likelihood.sum() / ((symbols > 0).sum(1) + 1).sum()


def held_out_points(num_sets: int, num_points: int) -> np.ndarray:
    """Draws the sets to measure on, the same each time: float32 `[B, n, 2]`."""
    random = np.random.default_rng((1506, 3134, num_points))
    return random.random((num_sets, num_points, 2), np.float32)


def cut_at_end(symbols: np.ndarray) -> np.ndarray:
    """The points that symbols `[M]` stand for, up to the end.

    Example:
      >>> cut_at_end(np.array([2, 5, 1, 0, 0])).tolist()
      [1, 4, 0]
    """
    ends = np.flatnonzero(symbols == 0)
    return symbols[: ends[0] if len(ends) else None] - 1


def _build(config: PointerConfig, rngs: nnx.Rngs) -> PointerNetwork:
    return PointerNetwork(config, rngs=rngs)
