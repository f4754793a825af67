"""Multi-query associative recall: the task, its measures and its experiments."""

from __future__ import annotations

import dataclasses
import functools
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import optax

from attnx._checks import expect
from models.lm import LM, LMConfig
from models.train import Task, TrainConfig

# Where no value is asked for.
NO_LABEL = -1


@dataclasses.dataclass(frozen=True)
class RecallExperiment:
    """Multi-query associative recall (MQAR, Zoology, arXiv:2312.04927).

    Attributes:
      folder: of the run.
      model: the decoder.
      training: how it is trained.
      batch_size: sequences a step.
      lengths: tokens in which a sequence has all its pairs and questions; all are
        filled up to the longest, T. In long ones alone, where most tokens say nothing,
        linear attention does not begin to learn.
      pairs: how many pairs of key and value a sequence may hold, where they have room.
      tests: tokens and pairs of the sequences to measure on.
      test_size: of them, for each of `tests`.
    """

    folder: pathlib.Path
    model: LMConfig
    training: TrainConfig
    batch_size: int = 128
    lengths: tuple[int, ...] = (64, 128, 256, 512)
    pairs: tuple[int, ...] = (4, 8, 16, 32, 64)
    tests: tuple[tuple[int, int], ...] = (
        *((64, 4), (64, 8), (64, 16)),
        *((128, 8), (128, 32)),
        *((256, 16), (256, 64)),
        *((512, 4), (512, 16), (512, 64)),
    )
    test_size: int = 1024

    def task(self) -> Task[LM]:
        return Task(
            model=lambda rngs: LM(self.model, rngs=rngs),
            batch=np.uint32,
            loss=self._loss,
            validate=lambda model: float(
                np.mean(
                    [
                        self._measure(model, max(self.lengths), n, 64)[1]
                        for n in self.pairs
                    ]
                )
            ),
            tokens=self.batch_size * max(self.lengths),
            unit="nats per value",
        )

    def evaluate(self, model: LM) -> dict[str, float]:
        """Measures accuracy for each of `tests`, and the mean of these."""
        each = {
            f"accuracy, {n} pairs in {length}": self._measure(
                model, length, n, self.test_size
            )[0]
            for length, n in self.tests
        }
        return {"accuracy": float(np.mean(list(each.values()))), **each}

    def _loss(self, model: LM, step: jax.Array) -> jax.Array:
        key = jax.random.fold_in(self._keys()[0], step)
        batch = sequences(
            key, self.batch_size, self.lengths, self.pairs, self.model.vocab_size
        )
        asked, _, loss = _score(model, *batch)
        return loss / asked

    def _measure(
        self, model: LM, length: int, pairs: int, count: int
    ) -> tuple[float, float]:
        """Accuracy and loss of `count` sequences, of which training sees none."""
        key = jax.random.fold_in(self._keys()[1], pairs)
        size = min(count, self.batch_size)
        totals = np.zeros(3)
        for part in range(count // size):
            batch = sequences(
                jax.random.fold_in(key, part),
                size,
                (length,),
                (pairs,),
                self.model.vocab_size,
            )
            totals += np.array(_jit_score(model, *batch))
        asked, right, loss = totals.tolist()
        return right / asked, loss / asked

    def _keys(self) -> jax.Array:
        """Of the sequences to train on, and of those to measure on."""
        return jax.random.split(jax.random.key(self.training.seed))


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def sequences(
    key: jax.Array,
    count: int,
    lengths: tuple[int, ...],
    pairs: tuple[int, ...],
    vocab_size: int,
) -> tuple[jax.Array, jax.Array]:
    """Draws sequences that name values by keys, and then ask for them.

    Each begins with pairs of key and value, all different. Then each key comes once
    more, at an even distance from them; distances follow the power law of Zoology, few
    of them long. What is between are zeros, as in Zoology's figure 2.

    Args:
      key: of the random numbers.
      count: B.
      lengths: tokens of a sequence, for each one of these numbers; T is the largest, up
        to which zeros follow.
      pairs: how many of them: for each sequence one of these numbers, of those that its
        length, four tokens a pair, has room for.
      vocab_size: V; keys are the tokens from 1 to V / 2 - 1, and values the others.

    Returns:
      Tokens int32 `[B, T]`, and labels int32 `[B, T]`: where a key comes once more, the
      value that it names, and elsewhere `NO_LABEL`.

    Raises:
      ValueError: pairs for which there is no room, or no vocabulary.

    Example:
      >>> tokens, labels = sequences(jax.random.key(0), 3, (16,), (4,), 20)
      >>> tokens.shape, (labels >= 10).sum(1).tolist()
      ((3, 16), [4, 4, 4])
    """
    wanted = f"room for pairs {pairs} in tokens {lengths} of {vocab_size} kinds"
    expect(4 * min(pairs) <= min(lengths), "lengths", wanted, lengths)
    fit = max(pairs) <= min(max(lengths) // 4, vocab_size // 2 - 1)
    expect(fit, "pairs", wanted, pairs)
    draw = functools.partial(
        _sequence, lengths=lengths, pairs=pairs, vocab_size=vocab_size
    )
    return jax.vmap(draw)(jax.random.split(key, count))


def _sequence(key, *, lengths, pairs, vocab_size):
    length_key, count_key, pair_key, gap_key = jax.random.split(key, 4)
    length, most, half = max(lengths), max(pairs), vocab_size // 2
    own = jax.random.choice(length_key, jnp.array(lengths))
    has_room = jnp.array(pairs) <= own // 4
    count = jax.random.choice(count_key, jnp.array(pairs), p=has_room / has_room.sum())
    index = jnp.arange(most)

    # The largest of random numbers are a draw without replacement.
    scores = jax.random.uniform(pair_key, (2, half - 1))
    names, values = jax.lax.top_k(scores, most)[1].astype(jnp.int32)
    names, values = names + 1, values + half

    # As are the largest of log-probabilities with Gumbel noise. The density of the
    # power law, a x ** (a - 1) for a = 0.01, at x = 1, 2, ...
    slots = jnp.arange(length // 2)
    scores = -0.99 * jnp.log1p(slots) + jax.random.gumbel(gap_key, slots.shape)
    scores = jnp.where(slots < own // 2 - count, scores, -jnp.inf)
    asked_at = 2 * (count + jax.lax.top_k(scores, most)[1])

    # Those beyond the count are put beyond the end, where they are dropped.
    kept = lambda where: jnp.where(index < count, where, length)
    tokens = jnp.zeros(length, jnp.int32).at[kept(2 * index)].set(names, mode="drop")
    tokens = tokens.at[kept(2 * index + 1)].set(values, mode="drop")
    tokens = tokens.at[kept(asked_at)].set(names, mode="drop")
    labels = jnp.full(length, NO_LABEL, jnp.int32)
    return tokens, labels.at[kept(asked_at)].set(values, mode="drop")


def answered(
    model: LM, tokens: jax.Array, labels: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Where of `[B, T]` something is asked, where the answer is right; and losses."""
    asked = labels != NO_LABEL
    logits = model(tokens)
    losses = optax.softmax_cross_entropy_with_integer_labels(
        logits, jnp.where(asked, labels, 0)
    )
    right = asked & (logits.argmax(-1) == labels)
    return asked, right, jnp.where(asked, losses, 0)


def _score(model, tokens, labels):
    """Values asked for, those that the model likes best, and the sum of losses."""
    return tuple(x.sum() for x in answered(model, tokens, labels))


def _experiment(name: str, *pattern: str) -> RecallExperiment:
    """For an H100: two layers of a convolution and mixers, without channel mixers."""
    model = LMConfig(
        pattern=("convolution", *pattern),
        vocab_size=8192,
        num_layers=2 * (1 + len(pattern)),
        d_model=64,
        num_heads=1,
        mlp_dim=0,
        tie_embeddings=True,
        dtype="bfloat16",
        window=16,
    )
    training = TrainConfig(
        steps=15_000,
        learning_rate=3e-3,
        warmup_steps=200,
        validate_every=200,
        save_every=2000,
        steps_per_call=40,
    )
    return RecallExperiment(pathlib.Path("runs") / name, model, training)


EXPERIMENTS = {
    "recall-softmax": _experiment("recall-softmax", "softmax"),
    "recall-based": _experiment("recall-based", "taylor", "window"),
    "recall-linear": _experiment("recall-linear", "linear"),
}

_jit_score = jax.jit(_score)
