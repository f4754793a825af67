"""Pointer networks: their scores, their search, their training and their commands."""

import dataclasses
import functools
import itertools
import os
import pathlib
import signal

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import relative_rms, shaken

from models.pointer.experiment import PointerExperiment, held_out_points
from models.pointer.network import PointerConfig, PointerNetwork, additive_scores
from models.pointer.picture import draw_answers
from models.pointer.presets import PRESETS
from models.pointer.search import anything, log_likelihood, search, tours
from models.train import Interrupted, TrainConfig, load, read_metrics, train

TINY = PointerConfig(d_model=16, num_layers=1, num_heads=2, mlp_dim=16)


def tiny(preset):
    """A preset at the smallest sizes that leave it what it is."""
    return dataclasses.replace(
        preset,
        model=dataclasses.replace(TINY, encoder=preset.model.encoder),
        training=TrainConfig(
            steps=30,
            learning_rate=1e-2,
            warmup_steps=2,
            save_every=15,
            validate_every=5,
            steps_per_call=5,
        ),
        lengths=(5, 5) if preset.problem == "tsp" else (4, 6),
        batch_size=16,
        test_lengths=(5,),
        test_size=3,
        beam_width=2,
        folder=pathlib.Path(),
    )


# Presets that differ in sizes alone are one here, under the first one's name.
KINDS = {}
for _name, _preset in PRESETS.items():
    if tiny(_preset) not in KINDS.values():
        KINDS[_name] = tiny(_preset)

forward = jax.jit(PointerNetwork.__call__)
encode = jax.jit(PointerNetwork.encode)
step = jax.jit(PointerNetwork.step)


@functools.cache
def network(encoder):
    config = dataclasses.replace(TINY, encoder=encoder)
    return shaken(PointerNetwork(config, rngs=nnx.Rngs(0)), 0.5)


@pytest.fixture(params=["lstm", "attention"])
def model(request):
    return network(request.param)


@pytest.fixture
def lstm():
    """One network is enough for the search, which does not know its encoder."""
    return network("lstm")


@pytest.fixture(scope="module")
def points():
    points = np.random.default_rng(0).random((3, 5, 2), np.float32)
    return jnp.asarray(points), jnp.array([5, 3, 4])


def test_additive_scores_are_equation_3():
    random = np.random.default_rng(0)
    query, key = random.standard_normal((2, 3, 4)), random.standard_normal((2, 5, 4))
    vector = random.standard_normal(4)
    scores = additive_scores(*map(jnp.float32, (query, key, vector)))
    for b, i, j in np.ndindex(2, 3, 5):
        wanted = vector @ np.tanh(key[b, j] + query[b, i])
        assert scores[b, i, j] == pytest.approx(wanted, abs=1e-5)


def test_steps_equal_the_parallel_forward(model, points):
    symbols = jnp.array([[3, 1, 5, 2, 0], [2, 3, 1, 0, 0], [4, 4, 1, 3, 2]])
    wanted = forward(model, *points, symbols)
    memory, carry = encode(model, *points)
    carry = jax.tree.map(lambda x: x[:, None], carry)
    last = jnp.zeros((3, 1), jnp.int32)
    for t in range(5):
        scores, carry = step(model, memory, carry, last)
        chex.assert_trees_all_close(scores[:, 0], wanted[:, t], atol=2e-6)
        last = symbols[:, t, None]


def test_padding_is_not_pointed_to_and_changes_nothing(model, points):
    places, lengths = points
    symbols = jnp.array([[3, 1, 2, 0, 0]] * 3)
    scores = forward(model, places, lengths, symbols)
    padding = jnp.arange(6) > lengths[:, None, None]
    chex.assert_trees_all_equal(
        jnp.isneginf(scores), padding | jnp.zeros_like(scores, bool)
    )
    other = jnp.where(jnp.arange(5)[:, None] < lengths[:, None, None], places, 7.0)
    chex.assert_trees_all_equal(forward(model, other, lengths, symbols), scores)
    alone = forward(model, places[1:2, :3], lengths[1:2], symbols[1:2])
    error = relative_rms(scores[1:2, :, :4], alone)
    assert error < 1e-6


def test_beam_of_width_1_is_greedy(lstm, points):
    found = search(lstm, *points, 5, width=1, allowed=anything)
    memory, carry = encode(lstm, *points)
    carry = jax.tree.map(lambda x: x[:, None], carry)
    last, ended = jnp.zeros((3, 1), jnp.int32), jnp.zeros((3, 1), bool)
    for t in range(5):
        scores, carry = step(lstm, memory, carry, last)
        last = jnp.where(ended, 0, scores.argmax(-1))
        ended |= last == 0
        chex.assert_trees_all_equal(found.symbols[:, :, t], last)


def test_wide_beam_is_exhaustive(lstm, points):
    """Over all 40 sequences of three points that are cut after three symbols."""
    places, lengths = points[0][:1, :3], jnp.array([3])
    every = [
        x
        for x in itertools.product(range(4), repeat=3)
        if not any(a == 0 and b > 0 for a, b in itertools.pairwise(x))
    ]
    assert len(every) == 40
    likely = jax.jit(log_likelihood, static_argnames="allowed")(
        lstm,
        jnp.tile(places, (40, 1, 1)),
        jnp.tile(lengths, 40),
        jnp.array(every),
        allowed=anything,
    ).sum(1)
    order = jnp.argsort(-likely)
    found = search(lstm, places, lengths, 3, width=41, allowed=anything)
    chex.assert_trees_all_equal(found.symbols[0, :40], jnp.array(every)[order])
    chex.assert_trees_all_close(found.log_probability[0, :40], likely[order], atol=2e-6)
    assert jnp.exp(likely).sum() == pytest.approx(1, abs=1e-5)
    assert jnp.isneginf(found.log_probability[0, 40])


def test_tours_visit_every_city_once(lstm, points):
    """Padding apart; and all tours of four cities are found by a beam as wide."""
    found = search(lstm, *points, 6, width=6, allowed=tours)
    for symbols, likely, n in zip(*found, points[1].tolist(), strict=True):
        real = np.asarray(symbols)[np.isfinite(likely)]
        np.testing.assert_array_equal(real[:, 0], 1)
        visited, rest = real[:, :n], real[:, n:]
        np.testing.assert_array_equal(
            np.sort(visited), [np.arange(1, n + 1)] * len(real)
        )
        np.testing.assert_array_equal(rest, 0)
    chex.assert_trees_all_close(
        jnp.exp(found.log_probability[1:]).sum(1), jnp.ones(2), atol=1e-5
    )
    assert len(np.unique(found.symbols[2], axis=0)) == 6


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Gives an experiment by name, its task and the model that it trained, once."""

    @functools.cache
    def run(name):
        folder = tmp_path_factory.mktemp(name)
        experiment = dataclasses.replace(KINDS[name], folder=folder)
        task = experiment.task()
        return experiment, task, train(task, experiment.training, folder)

    return run


@pytest.mark.parametrize("name", KINDS)
def test_presets_train(name, trained):
    experiment, _, _ = trained(name)
    lines = read_metrics(experiment.folder)
    assert len(lines) == 30
    held_out = [line["validation"] for line in lines if "validation" in line]
    assert held_out[-1] < held_out[0]


@pytest.mark.parametrize("name", ["hull", "delaunay", "tsp"])
def test_trained_networks_are_measured_and_drawn(name, trained):
    experiment, _, model = trained(name)
    measures = experiment.evaluate(model)
    assert 0 <= measures["invalid outputs, 5 points"] <= 1
    [(first, *_), *rest] = experiment.answer(model, held_out_points(3, 5))
    assert len(rest) == 2
    assert set(first.tolist()) <= set(range(5))
    assert draw_answers(experiment, model).read_bytes().startswith(b"\x89PNG")


def test_interrupted_run_resumes_bit_for_bit(tmp_path, trained):
    experiment, task, whole = trained("tsp")

    def interrupt(step):
        if step == 11:
            os.kill(os.getpid(), signal.SIGINT)
        return task.batch(step)

    stopped = dataclasses.replace(task, batch=interrupt)
    with pytest.raises(Interrupted, match="stopped after step 15 of 30"):
        train(stopped, experiment.training, tmp_path)
    resumed = train(task, experiment.training, tmp_path)
    chex.assert_trees_all_equal(nnx.state(resumed), nnx.state(whole))
    loaded = load(task, experiment.training, tmp_path)
    chex.assert_trees_all_equal(nnx.state(loaded), nnx.state(whole))


def test_mistakes_are_named():
    with pytest.raises(
        ValueError, match="encoder: expected lstm or attention, got gru"
    ):
        PointerConfig(encoder="gru")
    with pytest.raises(ValueError, match="lengths: expected two numbers from 3 up"):
        PointerExperiment(lengths=(6, 5))
    with pytest.raises(
        NotImplementedError, match="labels of tsp need sets of one size"
    ):
        PointerExperiment(problem="tsp", lengths=(5, 6))
