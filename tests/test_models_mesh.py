"""Training on many devices comes to the same as on one."""

import dataclasses
import os
import signal

import jax
import numpy as np
import pytest
from flax import nnx

from models import runs, text
from models.lm import LM, LMConfig
from models.mesh import attend_in_pieces, make_mesh, of_state
from models.train import Interrupted, TrainConfig, read_metrics, train

TINY = text.TextExperiment(
    model=LMConfig(
        ("lightning", "softmax"), num_layers=2, d_model=32, num_heads=2, mlp_dim=64
    ),
    training=TrainConfig(
        steps=6, learning_rate=1e-2, warmup_steps=2, save_every=6, validate_every=6
    ),
    batch_size=4,
    length=32,
    validation_length=64,
)


def test_a_run_moves_from_mesh_to_mesh(tmp_path):
    """Stopped on one mesh it goes on on another: all as on one device."""
    task = TINY.task()
    train(task, TINY.training, tmp_path / "one")
    stop = tmp_path / "many"

    def interrupting(step):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)
        return task.batch(step)

    interrupted = dataclasses.replace(task, batch=interrupting)
    both = make_mesh("data=2,context=2")
    with pytest.raises(Interrupted, match="step 4 of 6"):
        train(interrupted, TINY.training, stop, both)
    model = train(task, TINY.training, stop, make_mesh("data=4"))
    one, many = (read_metrics(tmp_path / name) for name in ("one", "many"))
    assert [line["step"] for line in many] == list(range(1, 7))
    losses = [[line["loss"] for line in lines] for lines in (one, many)]
    np.testing.assert_allclose(*losses, rtol=1e-4)
    assert many[-1]["validation"] == pytest.approx(one[-1]["validation"], rel=1e-4)
    assert all(len(x.devices()) == 1 for x in jax.tree.leaves(nnx.state(model)))


def test_parameters_are_cut_over_data():
    state = nnx.state(LM(TINY.model, rngs=nnx.Rngs(0)), nnx.Param)
    mesh = make_mesh("data=4,context=2")
    state = jax.device_put(state, of_state(mesh, state))
    for x in jax.tree.leaves(state):
        if x.ndim > 1:
            assert x.addressable_shards[0].data.size == x.size // 4


def test_what_cannot_be_done_is_named():
    for sizes, message in (
        ("batch=2", "got 'batch=2'"),
        ("data=", "got 'data='"),
        ("data=4,context=4", "takes 16 devices, and there are 8"),
    ):
        with pytest.raises(runs.RunError, match=message):
            make_mesh(sizes)
    moba = LM(dataclasses.replace(TINY.model, pattern=("moba",)), rngs=nnx.Rngs(0))
    with pytest.raises(runs.RunError, match="MoBAMixer cannot be trained on many"):
        attend_in_pieces(moba, make_mesh("data=2"))
