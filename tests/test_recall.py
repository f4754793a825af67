"""Multi-query associative recall: what is asked, and what is counted."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import recall
from models.lm import LMConfig
from models.recall import NO_LABEL, RecallExperiment, sequences
from models.train import TrainConfig

TINY = RecallExperiment(
    folder=None,
    model=LMConfig(
        ("convolution", "softmax"),
        vocab_size=20,
        num_layers=2,
        d_model=8,
        num_heads=1,
        mlp_dim=0,
    ),
    training=TrainConfig(steps=2),
    batch_size=8,
    lengths=(8, 16),
    pairs=(2, 4),
    tests=((8, 2), (16, 2), (16, 4)),
    test_size=16,
)


def test_sequences_ask_for_what_they_named():
    tokens, labels = (
        np.array(x) for x in sequences(jax.random.key(0), 50, (16, 32), (2, 4, 8), 40)
    )
    counts = []
    for row, asked in zip(tokens, labels, strict=True):
        where = np.flatnonzero(asked != NO_LABEL)
        count = len(where)
        counts.append(count)
        names, values = row[: 2 * count].reshape(count, 2).T
        assert len(set(names)) == len(set(values)) == count
        assert 0 < names.min() <= names.max() < 20 <= values.min()
        # Each key once more, an even distance behind the pairs; all else is zeros.
        assert sorted(row[where]) == sorted(names)
        assert (where % 2 == 0).all()
        assert where.min() >= 2 * count
        named = dict(zip(names, values, strict=True))
        assert [named[key] for key in row[where]] == list(asked[where])
        assert (row != 0).sum() == 3 * count
    assert set(counts) == {2, 4, 8}


def test_lengths_are_drawn_alike():
    _, labels = sequences(jax.random.key(0), 300, (16, 128), (4,), 64)
    is_short = (np.array(labels)[:, 16:] == NO_LABEL).all(1)
    assert 0.45 < is_short.mean() < 0.7  # Few of the long ones end as early.


def test_most_distances_are_short():
    _, labels = sequences(jax.random.key(0), 200, (256,), (4,), 64)
    where = np.array(labels != NO_LABEL)
    near = where[:, :64].sum() / where.sum()
    assert 0.55 < near < 0.95  # A uniform draw would put 0.23 there.


def test_sequences_follow_their_key():
    draw = lambda seed: sequences(jax.random.key(seed), 50, (32,), (2, 4, 8), 40)
    chex.assert_trees_all_equal(draw(1), draw(1))
    assert (draw(1)[0] != draw(2)[0]).any()


@pytest.mark.parametrize(
    ("name", "lengths", "vocab_size"),
    [("pairs", (15,), 40), ("pairs", (32,), 6), ("lengths", (7, 32), 40)],
)
def test_there_must_be_room(name, lengths, vocab_size):
    with pytest.raises(ValueError, match=f"{name}: expected room for pairs"):
        sequences(jax.random.key(0), 2, lengths, (2, 4), vocab_size)


class Copier(nnx.Module):
    """Knows the answers: the value behind the first occurrence of each token."""

    def __call__(self, tokens):
        same = tokens[:, :, None] == tokens[:, None, :]
        first = same.argmax(-1)
        answer = jnp.take_along_axis(jnp.roll(tokens, -1, 1), first, 1)
        return 100.0 * jax.nn.one_hot(answer, 20)


def test_only_answers_count():
    measures = TINY.evaluate(Copier())
    assert measures == {
        "accuracy": 1.0,
        "accuracy, 2 pairs in 8": 1.0,
        "accuracy, 2 pairs in 16": 1.0,
        "accuracy, 4 pairs in 16": 1.0,
    }
    task = TINY.task()
    assert float(task.loss(Copier(), task.batch(0))) == pytest.approx(0, abs=1e-6)


def test_a_new_model_knows_nothing():
    task = TINY.task()
    model = task.model(nnx.Rngs(0))
    loss = jax.jit(task.loss)
    assert float(loss(model, np.uint32(0))) == pytest.approx(np.log(20), rel=1e-5)
    assert task.validate(model) == pytest.approx(np.log(20), rel=1e-5)
    assert TINY.evaluate(model)["accuracy"] < 0.5


def test_training_and_tests_draw_apart():
    train, test = TINY._keys()
    assert (jax.random.key_data(train) != jax.random.key_data(test)).any()


def test_experiments_differ_in_their_mixers_alone():
    softmax, *others = recall.EXPERIMENTS.values()
    for other in others:
        sizes = {"pattern": ("softmax",), "num_layers": 1}
        assert dataclasses.replace(other.model, **sizes) == dataclasses.replace(
            softmax.model, **sizes
        )
        fields = {"folder": None, "model": None}
        assert dataclasses.replace(other, **fields) == dataclasses.replace(
            softmax, **fields
        )
