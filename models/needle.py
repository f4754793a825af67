"""Needles in a haystack, found at any distance: the task and its experiments."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np

from attnx._checks import expect
from models.lm import LM, LMConfig
from models.recall import NO_LABEL, answered
from models.train import Task, TrainConfig


@dataclasses.dataclass(frozen=True)
class NeedleExperiment:
    """Retrieval of values that were named anywhere before.

    Attributes:
      folder: of the run.
      model: the decoder.
      training: how it is trained.
      batch_size: sequences a step.
      length: T, tokens in each.
      needles: names that each sequence gives a value to. Of one it is a passkey.
      values: that a name may have.
      test_size: sequences to measure on.
      parts: ranges of distance to measure apart, of equal width.
    """

    folder: pathlib.Path
    model: LMConfig
    training: TrainConfig
    batch_size: int = 32
    length: int = 1024
    needles: int = 1
    values: int = 16
    test_size: int = 1024
    parts: int = 8

    def task(self) -> Task[LM]:
        return Task(
            model=lambda rngs: LM(self.model, rngs=rngs),
            batch=np.uint32,
            loss=self._loss,
            validate=lambda model: self._measure(model, 2 * self.batch_size)[1],
            tokens=self.batch_size * self.length,
            unit="nats per value",
        )

    def evaluate(self, model: LM) -> dict[str, float]:
        """Measures accuracy for each range of distance, and the mean of these."""
        accuracies, _ = self._measure(model, self.test_size)
        each = dict(zip(self.ranges(), accuracies.tolist(), strict=True))
        return {"accuracy": float(accuracies.mean()), **each}

    def ranges(self) -> list[str]:
        """What the measures of the ranges of distance are called."""
        ends = np.linspace(0, self.length, self.parts + 1).astype(int).tolist()
        return [f"accuracy, {a} to {b} back" for a, b in itertools.pairwise(ends)]

    def _loss(self, model: LM, step: jax.Array) -> jax.Array:
        key = jax.random.fold_in(self._keys()[0], step)
        asked, _, loss = self._score(model, key)
        return loss / asked.sum()

    def _measure(self, model: LM, count: int) -> tuple[np.ndarray, float]:
        """Accuracies and the loss of `count` sequences, of which training sees none."""
        keys = jax.random.split(self._keys()[1], max(1, count // self.batch_size))
        parts = [_jit_score(self, model, key) for key in keys]
        asked, right, loss = jax.tree.map(lambda *x: np.sum(x, 0), *parts)
        return right / np.maximum(asked, 1), float(loss / asked.sum())

    def _score(self, model: LM, key: jax.Array):
        """Of each range of distance the questions and right answers; sum of losses."""
        tokens, labels, distances = haystacks(
            key, self.batch_size, self.length, self.needles, self.values
        )
        asked, right, losses = answered(model, tokens, labels)
        part = distances * self.parts // self.length
        one_hot = asked[..., None] & (part[..., None] == jnp.arange(self.parts))
        right = one_hot & right[..., None]
        return one_hot.sum((0, 1)), right.sum((0, 1)), losses.sum()

    def _keys(self) -> jax.Array:
        """Of the sequences to train on, and of those to measure on."""
        return jax.random.split(jax.random.key(self.training.seed))


def vocabulary(needles: int, values: int) -> int:
    """Tokens: a needle for each name and value, a question for each name, and hay.

    Example:
      >>> vocabulary(2, 4)
      26
    """
    return needles * values + needles + 16


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def haystacks(
    key: jax.Array, count: int, length: int, needles: int, values: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    r"""Draws hay in which needles lie, one a name, and questions for them behind.

    A needle is one token that tells a name and its value. After it, at half of all
    places, come questions for names drawn at random; those for names that have not come
    yet are hay, as is all else, at random as well.

    Args:
      key: of the random numbers.
      count: B.
      length: T.
      needles: names.
      values: that a name may have.

    Returns:
      Tokens int32 `[B, T]`: value v of name n is n * values + v, then come the
      questions, then the hay. Labels int32 `[B, T]`: at a question the value, and
      elsewhere `NO_LABEL`. Distances int32 `[B, T]` from questions back to the needles.

    Raises:
      ValueError: needles for which there is no room.

    Example:
      >>> tokens, labels, distances = haystacks(jax.random.key(2), 1, 8, 1, 4)
      >>> print(tokens[0], labels[0], distances[0], sep="\n")
      [ 5  9  2 18 15  4  4  4]
      [-1 -1 -1 -1 -1  2  2  2]
      [0 0 0 0 0 3 4 5]
    """
    expect(1 <= needles < length, "needles", f"1 to {length - 1}", needles)

    def one(key):
        keys = jax.random.split(key, 5)
        index = jnp.arange(length)
        # The largest of random numbers are a draw without replacement.
        places = jax.lax.top_k(jax.random.uniform(keys[0], (length,)), needles)[1]
        told = jax.random.randint(keys[1], (needles,), 0, values)
        name = jax.random.randint(keys[2], (length,), 0, needles)
        distances = index - places[name]
        asks = jax.random.bernoulli(keys[3], shape=(length,)) & (distances > 0)
        asks = asks.at[places].set(False)
        first = needles * values
        hay = jax.random.randint(
            keys[4], (length,), first + needles, vocabulary(needles, values)
        )
        tokens = jnp.where(asks, first + name, hay)
        tokens = tokens.at[places].set(jnp.arange(needles) * values + told)
        labels = jnp.where(asks, told[name], NO_LABEL)
        return tokens, labels, jnp.where(asks, distances, 0)

    return jax.vmap(one)(jax.random.split(key, count))


def _experiment(name: str, *pattern: str, needles: int, values: int, **sizes):
    """For an H100: minutes each."""
    model = LMConfig(
        pattern=pattern,
        vocab_size=vocabulary(needles, values),
        d_model=64,
        num_heads=2,
        mlp_dim=128,
        activation="silu",
        dtype="bfloat16",
        **sizes,
    )
    training = TrainConfig(
        steps=5000,
        learning_rate=2e-3,
        warmup_steps=200,
        validate_every=200,
        save_every=1000,
        steps_per_call=20,
    )
    folder = pathlib.Path("runs") / name
    return NeedleExperiment(folder, model, training, needles=needles, values=values)


# A window of as many keys as a query sees of the blocks, in the mean: 6 layers of it
# reach 366 tokens back, and 6 of the blocks reach all.
_passkey = functools.partial(
    _experiment, needles=1, values=16, num_layers=6, block_size=8, window=62
)
# The window has as many keys as the last query sees of spans and its own window. The
# layer below, which tells anchors what is near, forgets within 32 tokens, or 64.
_needle = functools.partial(_experiment, needles=2, values=8, num_layers=2, window=210)
EXPERIMENTS = {
    "passkey-power": _passkey("passkey-power", "power"),
    "passkey-window": _passkey("passkey-window", "window"),
    "needle-superlinear": _needle("needle-superlinear", "retention", "superlinear"),
    "needle-window": _needle("needle-window", "retention", "window"),
    "needle-dense": _needle("needle-dense", "retention", "softmax"),
}

_jit_score = jax.jit(NeedleExperiment._score, static_argnums=0)
