"""The language model: its data, its training, its checkpoints and its generation."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import anchors, data, runs, text
from models.checkpoint import DamagedCheckpoint
from models.lm import LM, LMConfig
from models.plot import plot
from models.sampling import generate
from models.train import Interrupted, TrainConfig, load, read_metrics, train

TINY = text.TextExperiment(
    model=LMConfig(num_layers=2, d_model=32, num_heads=2, mlp_dim=64),
    training=TrainConfig(
        steps=12, learning_rate=1e-2, warmup_steps=2, save_every=4, validate_every=6
    ),
    batch_size=2,
    length=32,
    validation_length=64,
)


@pytest.fixture(scope="module")
def task():
    """One task, and so one compiled validation, for the whole module."""
    return TINY.task()


@pytest.fixture(scope="module")
def whole_run(task, tmp_path_factory):
    """A run that nothing stopped: its folder and its model."""
    folder = tmp_path_factory.mktemp("whole")
    return folder, train(task, TINY.training, folder)


@pytest.fixture
def model():
    """A model whose output layers, zero at first, have been shaken up."""
    graph, params = nnx.split(LM(TINY.model, rngs=nnx.Rngs(0)))
    leaves, tree = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    noise = [
        0.1 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)
    ]
    # The decays are numbers of the model too, and must stay below 1.
    moved = [
        x - abs(n) if x.ndim == 1 else x + n for x, n in zip(leaves, noise, strict=True)
    ]
    return nnx.merge(graph, jax.tree.unflatten(tree, moved))


class StopAfter:
    """A task that sends this process a signal while it draws the batch of a step."""

    def __init__(self, task, step, number=signal.SIGINT):
        def batch(at):
            if at == step:
                os.kill(os.getpid(), number)
            return task.batch(at)

        self.task = dataclasses.replace(task, batch=batch)


def test_king_james_is_the_text_it_should_be():
    bible = data.king_james()
    assert bible.shape == (4_185_992,)
    assert len(np.unique(bible)) == 71
    assert bytes(bible[:30]) == b"\nIn the beginning God created "
    assert "pythonbible" not in sys.modules


def test_split_and_windows_predict_every_byte_once():
    training, validation = data.split(data.king_james())
    np.testing.assert_array_equal(
        np.concatenate([training, validation]), data.king_james()
    )
    assert len(validation) == 418_600
    windows = data.windows(validation, 100)
    np.testing.assert_array_equal(windows[:, 1:].ravel(), validation[1:418_501])
    np.testing.assert_array_equal(windows[:, :-1].ravel(), validation[:418_500])


def test_batches_depend_on_seed_and_step_alone():
    words = np.arange(1000, dtype=np.uint16)
    draw = lambda seed, step: data.batch(words, 4, 16, seed=seed, step=step)
    np.testing.assert_array_equal(draw(1, 5), draw(1, 5))
    assert (draw(1, 5) != draw(1, 6)).any()
    assert (draw(1, 5) != draw(2, 5)).any()
    np.testing.assert_array_equal(np.diff(draw(1, 5).astype(int)), 1)


def test_anchors_are_what_they_claim():
    """All but xz, which takes ten seconds: `python -m models anchors` has it."""
    training, validation = data.split(data.king_james())
    ngrams = anchors.witten_bell(training, validation, max_order=7)
    assert ngrams[1] == pytest.approx(anchors.ANCHORS["bigram"], abs=5e-4)
    assert min(ngrams) == pytest.approx(anchors.ANCHORS["best n-gram"], abs=5e-4)
    bz2 = anchors.compressed(training, validation, anchors.bz2.compress)
    assert bz2 == pytest.approx(anchors.ANCHORS["bz2"], abs=5e-4)


def test_witten_bell_by_hand():
    """After "abab": P(a) mixes 2/4 seen and 2/4 of 1/256; "ab" was seen twice."""
    [unigram, bigram] = anchors.witten_bell(
        np.frombuffer(b"abab", np.uint8), np.frombuffer(b"a", np.uint8), 2
    )
    once = (2 + 2 / 256) / (4 + 2)
    assert unigram == pytest.approx(-np.log(once))
    assert bigram == pytest.approx(-np.log((1 + 1 * once) / (1 + 1)))


def test_training_lowers_the_loss(whole_run):
    folder, _ = whole_run
    lines = read_metrics(folder)
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert lines[0]["loss"] == pytest.approx(np.log(256), rel=1e-3)
    assert lines[-1]["loss"] < 0.75 * lines[0]["loss"]
    validated = [line["step"] for line in lines if "validation" in line]
    assert validated == [6, 12]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_run_resumes_bit_for_bit(task, whole_run, tmp_path, number):
    """It stops after the step it was in, saves, and ends where the others ended."""
    with pytest.raises(Interrupted, match=r"stopped after step 6 of 12.*checkpoints/6"):
        train(StopAfter(task, 5, number).task, TINY.training, tmp_path)
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4, 5, 6]
    resumed = train(task, TINY.training, tmp_path)

    folder, model = whole_run
    chex.assert_trees_all_equal(nnx.state(resumed), nnx.state(model))
    losses = lambda folder: [line["loss"] for line in read_metrics(folder)]
    assert losses(tmp_path) == losses(folder)


def test_killed_run_redoes_the_steps_after_its_checkpoint(task, whole_run, tmp_path):
    """Without a chance to save: the lines past the checkpoint are written anew."""

    def fail(step):
        if step == 7:
            raise OSError("gone")
        return task.batch(step)

    with pytest.raises(OSError, match="gone"):
        train(dataclasses.replace(task, batch=fail), TINY.training, tmp_path)
    assert len(read_metrics(tmp_path)) == 7
    resumed = train(task, TINY.training, tmp_path)
    assert [line["step"] for line in read_metrics(tmp_path)] == list(range(1, 13))
    chex.assert_trees_all_equal(nnx.state(resumed), nnx.state(whole_run[1]))


def test_finished_run_is_read_and_not_trained_again(task, whole_run):
    folder, model = whole_run

    def fail(step):
        raise AssertionError("a batch was drawn")

    again = train(dataclasses.replace(task, batch=fail), TINY.training, folder)
    chex.assert_trees_all_equal(nnx.state(again), nnx.state(model))
    loaded = load(task, TINY.training, folder)
    chex.assert_trees_all_equal(nnx.state(loaded), nnx.state(model))


@pytest.mark.parametrize("how", ["flipped", "emptied", "deleted"])
def test_damaged_checkpoint_says_so(task, tmp_path, how):
    with pytest.raises(Interrupted):
        train(StopAfter(task, 4).task, TINY.training, tmp_path)
    checkpoints = tmp_path / "checkpoints"
    files = [path for path in (checkpoints / "5").rglob("*") if path.is_file()]
    largest = max(files, key=lambda path: path.stat().st_size)
    if how == "flipped":
        content = bytearray(largest.read_bytes())
        content[len(content) // 2] ^= 255
        largest.write_bytes(content)
    for path in files:
        if how == "emptied":
            path.write_bytes(b"")
        elif how == "deleted":
            path.unlink()
    message = r"checkpoints/5: this checkpoint is damaged.*from step 4"
    with pytest.raises(DamagedCheckpoint, match=message):
        train(task, TINY.training, tmp_path)


def test_no_checkpoint_says_so(task, tmp_path):
    with pytest.raises(runs.RunError, match="no checkpoint here; train first"):
        load(task, TINY.training, tmp_path)


def test_folder_belongs_to_one_experiment(tmp_path):
    experiment = dataclasses.replace(TINY, folder=tmp_path / "run")
    assert runs.claim(experiment) == runs.claim(experiment) == tmp_path / "run"
    default = text.TextExperiment()
    assert runs.read(tmp_path / "run", default) == experiment
    other = dataclasses.replace(experiment, length=33)
    with pytest.raises(runs.RunError, match=r"other settings \(length\)"):
        runs.claim(other)
    with pytest.raises(runs.RunError, match="no run here"):
        runs.read(tmp_path, default)


def test_steps_equal_the_parallel_forward(model):
    """A prompt of any length, then token by token: the logits of the whole."""
    tokens = jax.random.randint(jax.random.key(2), (2, 45), 0, 256)
    wanted = jax.jit(model)(tokens)
    logits, cache = model.step(tokens[:, :37], model.init_cache(2))
    got = [logits]
    step = jax.jit(model.step)
    for i in range(37, 45):
        logits, cache = step(tokens[:, i : i + 1], cache)
        got.append(logits)
    chex.assert_trees_all_close(jnp.concatenate(got, 1), wanted, atol=2e-5)


def test_the_future_does_not_change_the_past(model):
    tokens = jax.random.randint(jax.random.key(2), (1, 45), 0, 256)
    changed = tokens.at[:, 30:].set(0)
    before, after = jax.jit(model)(tokens), jax.jit(model)(changed)
    chex.assert_trees_all_equal(before[:, :30], after[:, :30])
    assert (before[:, 30:] != after[:, 30:]).any()


def test_generate_takes_the_likeliest_byte_at_temperature_0(model):
    prompt = jax.random.randint(jax.random.key(3), (2, 9), 0, 256)
    key = jax.random.key(0)
    greedy = generate(model, prompt, 6, key=key, temperature=0.0)
    tokens = jnp.concatenate([prompt, greedy], 1)
    likeliest = jax.jit(model)(tokens)[:, 8:-1].argmax(-1)
    chex.assert_trees_all_equal(greedy, likeliest)
    warm = [generate(model, prompt, 6, key=key, temperature=1.0) for _ in range(2)]
    chex.assert_trees_all_equal(*warm)
    assert (warm[0] != greedy).any()


def test_nats_per_byte_weighs_every_byte_alike(model):
    """Whatever the window count does not divide: the mean over all windows."""
    words = data.split(data.king_james())[1][: 37 * 256 + 9]
    windows = jnp.asarray(data.windows(words, 256), jnp.int32)
    log_probability = jax.nn.log_softmax(jax.jit(model)(windows[:, :-1]))
    picked = jnp.take_along_axis(log_probability, windows[:, 1:, None], -1)
    measured = text.nats_per_byte(model, words, 256)
    assert measured == pytest.approx(-float(picked.mean()), rel=1e-5)


def test_sample_is_text_that_begins_with_its_prompt(model):
    one = text.sample(model, "In ", 20, temperature=1.0, seed=0)
    other = text.sample(model, "In ", 20, temperature=1.0, seed=1)
    assert one.startswith("In ")
    assert one != other


def test_plot_draws_the_run(whole_run):
    path = plot(whole_run[0], anchors.ANCHORS)
    assert path.read_bytes().startswith(b"\x89PNG")


def test_command_line_names_what_is_wrong(tmp_path):
    """One line on the error stream, no traceback."""
    command = [sys.executable, "-m", "models", "eval", "lm", "--folder", str(tmp_path)]
    root = pathlib.Path(__file__).parents[1]
    ran = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert ran.returncode == 1
    assert ran.stderr.strip() == f"{tmp_path}: no run here; train first."


def test_metrics_are_json_lines(whole_run):
    lines = (whole_run[0] / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line)["tokens_per_second"] > 0 for line in lines)
