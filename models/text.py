"""Language modelling of a text, byte by byte: the task, its loss and its measure."""

from __future__ import annotations

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from attnx.nn.routing import CommitmentLoss
from models import data, runs
from models.anchors import ANCHORS
from models.lm import LM, LMConfig
from models.sampling import generate
from models.train import Task, TrainConfig, load

_BYTES = 1 << 15  # measured at once, in windows


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
      load_balance: weight of the load-balance loss of Mixture-of-Head layers.
      commitment: weight of the commitment loss of Routing layers.
      start_from: a run whose model has the same parameters, to go on from in place of
        random ones.
    """

    folder: pathlib.Path = pathlib.Path("runs/lm")
    model: LMConfig = dataclasses.field(default_factory=LMConfig)
    training: TrainConfig = dataclasses.field(default_factory=TrainConfig)
    batch_size: int = 8
    length: int = 256
    validation_length: int = 1024
    load_balance: float = 0.01
    commitment: float = 1e-4
    start_from: str | None = None

    def task(self) -> Task[LM]:
        train, validation = data.split(data.king_james())
        sample = validation[: 16 * self.validation_length + 1]
        draw = functools.partial(
            data.batch, train, self.batch_size, self.length, seed=self.training.seed
        )
        return Task(
            model=self._model,
            batch=lambda step: (draw(step=step), np.uint32(step)),
            loss=self._loss,
            validate=lambda model: nats_per_byte(model, sample, self.validation_length),
            tokens=self.batch_size * self.length,
            unit="nats per byte",
            marks=ANCHORS,
        )

    def evaluate(self, model: LM) -> dict[str, float]:
        """Measures a model on the whole validation text."""
        _, validation = data.split(data.king_james())
        loss = nats_per_byte(model, validation, self.validation_length)
        last = nats_of_last_byte(model, validation, self.validation_length)
        return {"nats per byte": loss, "nats of the last byte": last}

    def _model(self, rngs: nnx.Rngs) -> LM:
        model = LM(self.model, rngs=rngs)
        if self.start_from is not None:
            folder = pathlib.Path(self.start_from)
            start = runs.read(folder, TextExperiment())
            trained = load(start.task(), start.training, folder)
            nnx.update(model, nnx.state(trained, nnx.Param))
        return model

    def _loss(self, model: LM, batch: tuple[jax.Array, jax.Array]) -> jax.Array:
        """Of training: with dropout, a new one each step, and balanced heads."""
        windows, step = batch
        key = None
        if self.model.dropout > 0:
            # The generator of the hardware: masks are most of all random numbers.
            key = jax.random.key(self.training.seed, impl="rbg")
            key = jax.random.fold_in(key, step)
        windows = jnp.asarray(windows, jnp.int32)
        logits, balance = model.with_load_balance(windows[:, :-1], dropout_key=key)
        commitment = sum(jax.tree.leaves(nnx.state(model, CommitmentLoss)))
        return (
            _cross_entropy(logits, windows[:, 1:])
            + self.load_balance * balance
            + self.commitment * commitment
        )


def next_byte_loss(model: LM, windows: jax.Array) -> jax.Array:
    """Mean cross-entropy in nats of each window's bytes `[B, T + 1]` but the first."""
    windows = jnp.asarray(windows, jnp.int32)
    return _cross_entropy(model(windows[:, :-1]), windows[:, 1:])


def nats_per_byte(model: LM, text: np.ndarray, length: int) -> float:
    """Measures the mean cross-entropy of a text, cut into windows of `length`.

    Every byte but the first is predicted once, from the bytes before it in its window
    (at the end, fewer bytes than a window are left out).
    """
    windows = data.windows(text, length)
    count = max(1, _BYTES // length)
    parts = np.split(windows, range(count, len(windows), count))
    losses = [float(_loss(model, part)) * len(part) for part in parts]
    return sum(losses) / len(windows)


def nats_of_last_byte(
    model: LM, text: np.ndarray, length: int, stride: int = 64
) -> float:
    """Measures the mean cross-entropy of the last byte of windows of `length`.

    It is predicted from all the bytes before it and from none behind, which is what
    counts where a layer's choice of what to attend to looks ahead.

    Args:
      model: what predicts.
      text: bytes `[S]`.
      length: of a window.
      stride: bytes from the start of a window to that of the next.
    """
    windows = np.lib.stride_tricks.sliding_window_view(text, length + 1)[::stride]
    count = max(1, _BYTES // length)
    parts = np.split(windows, range(count, len(windows), count))
    losses = [float(_last_loss(model, part)) * len(part) for part in parts]
    return sum(losses) / len(windows)


def sample(
    model: LM,
    prompt: str,
    num_bytes: int,
    *,
    temperature: float,
    seed: int,
    top_k: int | None = None,
    top_p: float = 1.0,
) -> str:
    """Writes on from a prompt; bytes that are no UTF-8 show as replacement marks.

    The settings are those of `sampling.generate`.
    """
    tokens = jnp.asarray(np.frombuffer(prompt.encode(), np.uint8), jnp.int32)[None]
    written = generate(
        model,
        tokens,
        num_bytes,
        key=jax.random.key(seed),
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )
    return prompt + bytes(np.asarray(written[0], np.uint8)).decode(errors="replace")


def _cross_entropy(logits: jax.Array, targets: jax.Array) -> jax.Array:
    return optax.softmax_cross_entropy_with_integer_labels(logits, targets).mean()


def _last_byte_loss(model: LM, windows: jax.Array) -> jax.Array:
    windows = jnp.asarray(windows, jnp.int32)
    return _cross_entropy(model(windows[:, :-1])[:, -1], windows[:, -1])


_loss = jax.jit(next_byte_loss)
_last_loss = jax.jit(_last_byte_loss)
