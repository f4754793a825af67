"""Language modelling of a text, byte by byte: the task, its loss and its measure."""

from __future__ import annotations

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

from models import data
from models.lm import LM, LMConfig, generate
from models.train import Task, TrainConfig


@dataclasses.dataclass(frozen=True)
class TextExperiment:
    """Byte-level language modelling of the King James Bible.

    Attributes:
      folder: of the run.
      model: the decoder.
      training: how it is trained.
      batch_size: windows a step.
      length: bytes predicted in each.
      validation_length: bytes of context at most when measuring.
    """

    folder: pathlib.Path = pathlib.Path("runs/lm")
    model: LMConfig = dataclasses.field(default_factory=LMConfig)
    training: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    batch_size: int = 8
    length: int = 256
    validation_length: int = 1024

    def task(self) -> Task[LM]:
        train, validation = data.split(data.king_james())
        sample = validation[: 16 * self.validation_length + 1]
        draw = functools.partial(
            data.batch, train, self.batch_size, self.length, seed=self.training.seed
        )
        return Task(
            model=lambda rngs: LM(self.model, rngs=rngs),
            batch=lambda step: draw(step=step),
            loss=next_byte_loss,
            validate=lambda model: nats_per_byte(model, sample, self.validation_length),
            tokens=self.batch_size * self.length,
        )


def next_byte_loss(model: LM, windows: jax.Array) -> jax.Array:
    """Mean cross-entropy in nats of each window's bytes `[B, T + 1]` but the first."""
    windows = jnp.asarray(windows, jnp.int32)
    logits = model(windows[:, :-1])
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, windows[:, 1:])
    return losses.mean()


def nats_per_byte(model: LM, text: np.ndarray, length: int) -> float:
    """Measures the mean cross-entropy of a text, cut into windows of `length`.

    Every byte but the first is predicted once, from the bytes before it in its window
    (at the end, fewer bytes than a window are left out).
    """
    windows = data.windows(text, length)
    count = max(1, 8192 // length)
    parts = np.split(windows, range(count, len(windows), count))
    losses = [float(_loss(model, part)) * len(part) for part in parts]
    return sum(losses) / len(windows)


def sample(
    model: LM, prompt: str, num_bytes: int, *, temperature: float, seed: int
) -> str:
    """Writes on from a prompt; bytes that are no UTF-8 show as replacement marks."""
    tokens = jnp.asarray(np.frombuffer(prompt.encode(), np.uint8), jnp.int32)[None]
    key = jax.random.key(seed)
    written = generate(model, tokens, num_bytes, key=key, temperature=temperature)
    return prompt + bytes(np.asarray(written[0], np.uint8)).decode(errors="replace")


_loss = jax.jit(next_byte_loss)
