"""Telling handwritten digits apart: the task, its measures and its experiments."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

from models import images
from models.train import Task, TrainConfig
from models.vit import ViT, ViTConfig, nat, vit

Dataset = Literal["digits", "mnist"]
DATASETS = {"digits": images.digits, "mnist": images.mnist}


@dataclasses.dataclass(frozen=True)
class VisionExperiment:
    """Classification of handwritten digits.

    Attributes:
      folder: of the run.
      dataset: a name in `DATASETS`.
      model: the classifier.
      training: how it is trained.
      batch_size: images a step.
      max_shift: of training images along each axis, in pixels.
      max_rotation: of training images, in degrees.
    """

    folder: pathlib.Path
    dataset: Dataset
    model: ViTConfig
    training: TrainConfig
    batch_size: int = 64
    max_shift: int = 1
    max_rotation: float = 10.0

    def task(self) -> Task[ViT]:
        data = DATASETS[self.dataset]()
        seed = self.training.seed
        draw = functools.partial(images.batch, *data.train, self.batch_size, seed=seed)
        return Task(
            model=lambda rngs: ViT(self.model, rngs=rngs),
            batch=lambda step: (*draw(step=step), np.uint32(step)),
            loss=self._loss,
            validate=lambda model: measure(model, *data.test)["cross-entropy"],
            tokens=self.batch_size * int(np.prod(self.model.grid)),
            unit="cross-entropy (nats)",
        )

    def evaluate(self, model: ViT) -> dict[str, float]:
        """Measures a model on all images held out."""
        return measure(model, *DATASETS[self.dataset]().test)

    def _loss(self, model: ViT, batch: tuple[jax.Array, ...]) -> jax.Array:
        """Of training: the images are moved anew each step."""
        pictures, labels, step = batch
        key = jax.random.fold_in(jax.random.key(self.training.seed), step)
        pictures = images.move(
            pictures,
            max_shift=self.max_shift,
            max_rotation=self.max_rotation,
            key=key,
        )
        losses = optax.softmax_cross_entropy_with_integer_labels(
            model(pictures), labels
        )
        return losses.mean()


def measure(model: ViT, pictures: np.ndarray, labels: np.ndarray) -> dict[str, float]:
    """Measures accuracy, and cross-entropy in nats."""
    parts = range(250, len(pictures), 250)
    logits = np.concatenate(
        [_logits(model, part) for part in np.split(pictures, parts)]
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return {
        "accuracy": float((logits.argmax(-1) == labels).mean()),
        "cross-entropy": float(losses.mean()),
    }


def _experiment(
    name: str, dataset: Dataset, model: ViTConfig, **options: Any
) -> VisionExperiment:
    return VisionExperiment(pathlib.Path("runs") / name, dataset, model, **options)


# Minutes on a CPU.
_DIGITS = {
    "training": TrainConfig(
        steps=2000,
        learning_rate=2e-3,
        warmup_steps=100,
        validate_every=100,
        save_every=500,
        steps_per_call=10,
    ),
}
# A minute on an H100.
_MNIST = {
    "training": TrainConfig(
        steps=6000,
        learning_rate=1e-3,
        warmup_steps=200,
        validate_every=300,
        save_every=3000,
        steps_per_call=30,
    ),
    "batch_size": 128,
    "max_shift": 2,
    "max_rotation": 15.0,
}
EXPERIMENTS = {
    experiment.folder.name: experiment
    for experiment in (
        _experiment("digits-vit", "digits", vit("nano/2", (8, 8)), **_DIGITS),
        _experiment(
            "digits-nat", "digits", nat("nano/1", (8, 8), kernel_size=3), **_DIGITS
        ),
        _experiment(
            "mnist-vit",
            "mnist",
            vit("nano/4", (28, 28), dtype="bfloat16"),
            **_MNIST,
        ),
        _experiment(
            "mnist-nat",
            "mnist",
            nat("nano/2", (28, 28), kernel_size=7, dtype="bfloat16"),
            **_MNIST,
        ),
    )
}

_logits = jax.jit(lambda model, pictures: model(jnp.asarray(pictures)))
