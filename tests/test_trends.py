"""What sparse attention should show: needles, chunks, and clusters that learn."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from attnx import masks
from attnx.nn.routing import CentroidStat, CommitmentLoss
from models import chunks, needle, text
from models.lm import LM, LMConfig
from models.needle import NO_LABEL, NeedleExperiment, haystacks, vocabulary
from models.train import Task, TrainConfig, load, train

TINY = NeedleExperiment(
    folder=None,
    model=LMConfig(
        ("softmax",),
        vocab_size=vocabulary(1, 2),
        num_layers=1,
        d_model=16,
        num_heads=1,
        mlp_dim=0,
    ),
    training=TrainConfig(
        steps=60,
        learning_rate=2e-2,
        warmup_steps=5,
        save_every=60,
        validate_every=60,
        steps_per_call=60,
    ),
    batch_size=16,
    length=16,
    values=2,
    test_size=64,
    parts=4,
)


def test_questions_ask_for_needles_before_them():
    needles, values = 3, 4
    tokens, labels, distances = map(
        np.array, haystacks(jax.random.key(0), 50, 32, needles, values)
    )
    for row, asked, back in zip(tokens, labels, distances, strict=True):
        [places] = np.nonzero(row < needles * values)
        assert sorted(row[places] // values) == [0, 1, 2]
        for i in range(32):
            is_question = needles * values <= row[i] < needles * (values + 1)
            assert is_question == (asked[i] != NO_LABEL)
            if is_question:
                wanted = (row[i] - needles * values) * values + asked[i]
                assert back[i] > 0
                assert row[i - back[i]] == wanted
    assert 0.2 < (labels != NO_LABEL).mean() < 0.5
    assert distances.max() > 24


def test_there_must_be_room_for_needles():
    with pytest.raises(ValueError, match="needles: expected 1 to 7, got 8"):
        haystacks(jax.random.key(0), 1, 8, 8, 2)


class Finder(nnx.Module):
    """Knows the value of the one needle, if it is no more than `reach` back."""

    def __init__(self, reach):
        self.reach = reach

    def __call__(self, tokens):
        is_needle = tokens < 2
        index = jnp.arange(tokens.shape[1])
        place = is_needle.argmax(1)[:, None]
        value = jnp.take_along_axis(tokens, place, 1)
        return jax.nn.one_hot(
            jnp.where(index - place <= self.reach, value, 1 - value), 19
        )


def test_accuracy_is_told_by_distance():
    """Four of sixteen ranges: what reaches 11 back finds the first three."""
    measures = TINY.evaluate(Finder(11))
    assert list(measures) == [
        "accuracy",
        "accuracy, 0 to 4 back",
        "accuracy, 4 to 8 back",
        "accuracy, 8 to 12 back",
        "accuracy, 12 to 16 back",
    ]
    assert list(measures.values()) == [0.75, 1.0, 1.0, 1.0, 0.0]


def test_a_small_model_learns_to_find_the_needle(tmp_path):
    model = train(TINY.task(), TINY.training, tmp_path)
    assert TINY.evaluate(model)["accuracy"] > 0.95


def test_power_and_window_cost_alike_and_reach_differently():
    """As many keys; within the layers that there are, one reaches all."""
    power, window = (needle.EXPERIMENTS[f"passkey-{x}"] for x in ("power", "window"))
    assert dataclasses.replace(power.model, pattern=("window",)) == window.model
    length, size = power.length, power.model.block_size
    blocks = masks.Power(size, window=2) | masks.Causal() & masks.Prefix(size)
    near = masks.Window(window.model.window - 1, 0)
    reached = {}
    keys = {}
    for name, mask in {"power": blocks, "window": near}.items():
        seen = np.asarray(mask.to_dense(length, length)[0, 0], np.float32)
        keys[name] = seen.sum() / length
        far = seen[-1:]
        for _ in range(power.model.num_layers - 1):
            far = np.minimum(far @ seen, 1)
        reached[name] = int(far.sum())
    assert keys["power"] <= keys["window"] < keys["power"] + 1
    assert reached == {"power": length, "window": 6 * (window.model.window - 1) + 1}


def test_needles_differ_in_their_attention_alone():
    dense, *others = (
        needle.EXPERIMENTS[f"needle-{x}"] for x in ("dense", "superlinear", "window")
    )
    for other in others:
        model = dataclasses.replace(other.model, pattern=dense.model.pattern)
        assert model == dense.model
        same = dataclasses.replace(other, folder=dense.folder, model=model)
        assert same == dense


def test_chunks_that_follow_the_text_keep_more():
    shares = chunks.measure(0)
    for budget in map(str, chunks.BUDGETS):
        assert shares["fixed"][budget] + 0.07 < shares["true"][budget] < 1
        assert shares["fixed"][budget] + 0.07 < shares["found"][budget]


def test_a_change_is_where_it_is():
    """And all keys fit in a budget of all."""
    key = jnp.repeat(jnp.eye(4)[:2], 20, 0)[None, :, None]
    assert chunks.change(key)[0].argmax() == 20
    starts = jnp.zeros((1, 40), bool)
    assert chunks.kept(key, key, starts, 1, 40) == pytest.approx(1)


class Centre(nnx.Variable):
    """The mean of what a model has seen: not a parameter."""


class Centred(nnx.Module):
    """A parameter that follows a moving average of the data."""

    def __init__(self):
        self.guess = nnx.Param(jnp.zeros(3))
        self.centre = Centre(jnp.zeros(3))
        self.use_running_average = False

    def __call__(self, x):
        if not self.use_running_average:
            self.centre[...] = 0.5 * self.centre + 0.5 * x
        return ((self.guess - self.centre) ** 2).sum()


def test_what_a_model_changes_is_carried_through_training_and_checkpoints(tmp_path):
    """A run that fails in between ends where the others end."""
    task = Task(
        model=lambda rngs: Centred(),
        batch=lambda step: np.full(3, step, np.float32),
        loss=lambda model, batch: model(batch),
        validate=lambda model: float(model(jnp.full(3, 100.0))),
        tokens=1,
    )
    config = TrainConfig(steps=4, warmup_steps=1, save_every=2, validate_every=4)
    whole = train(task, config, tmp_path / "whole")
    # Of 0, 1, 2 and 3; measuring leaves it where it is.
    chex.assert_trees_all_close(whole.centre[...], jnp.full(3, 2.125))
    assert whole.use_running_average
    assert float(whole.guess[0]) != 0

    def fail(step):
        if step == 3:
            raise OSError("gone")
        return task.batch(step)

    with pytest.raises(OSError, match="gone"):
        train(dataclasses.replace(task, batch=fail), config, tmp_path / "cut")
    resumed = train(task, config, tmp_path / "cut")
    loaded = load(task, config, tmp_path / "whole")
    for other in (resumed, loaded):
        assert other.use_running_average
        chex.assert_trees_all_equal(nnx.state(other), nnx.state(whole))


def test_centroids_follow_what_routing_layers_see():
    """A step of training moves them, and has their loss in its own, by its weight."""
    config = LMConfig(
        ("routing",), num_layers=1, d_model=8, num_heads=2, mlp_dim=0, num_clusters=2
    )
    experiment = text.TextExperiment(
        model=dataclasses.replace(config, window=4), commitment=10.0
    )
    windows = np.arange(34, dtype=np.uint8).reshape(2, 17)

    @jax.jit
    def step(model):
        loss = experiment._loss(model, (windows, 0))
        return loss, nnx.state(model, (CentroidStat, CommitmentLoss))

    model = LM(experiment.model, rngs=nnx.Rngs(0))
    loss, moved = step(model)
    [commitment] = map(float, jax.tree.leaves(nnx.filter_state(moved, CommitmentLoss)))
    assert commitment > 0.1
    # All bytes are alike to a new model.
    assert float(loss) == pytest.approx(np.log(256) + 10 * commitment, rel=1e-5)
    before = nnx.state(model, (CentroidStat, CommitmentLoss))
    change = jax.tree.map(lambda a, b: abs(a - b).max(), moved, before)
    assert min(jax.tree.leaves(change)) > 1e-4


def test_last_byte_is_predicted_from_those_before_it():
    """The mean over windows, of which the last part may be smaller."""
    model = lambda tokens: 3.0 * jax.nn.one_hot(tokens + 1, 256)
    words = np.arange(200, dtype=np.uint8)
    wanted = np.log(np.exp(3) + 255) - 3
    measured = text.nats_of_last_byte(Next(model), words, 32, stride=16)
    assert measured == pytest.approx(wanted, rel=1e-5)


class Next(nnx.Module):
    """A function as a model."""

    def __init__(self, fn):
        self.fn = fn

    def __call__(self, tokens):
        return self.fn(tokens)
