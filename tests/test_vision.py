"""Vision transformers and the digits that they learn."""

import dataclasses
import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models import images, vision
from models.train import TrainConfig, read_metrics, train
from models.vit import SIZES, ViT, ViTConfig, nat, vit


def test_names_give_sizes():
    config = vit("S/16", (224, 160), num_classes=1000)
    assert (config.d_model, config.num_layers, config.num_heads) == (384, 12, 6)
    assert (config.grid, config.kernel_size) == ((14, 10), None)
    dilated = nat("S/16", (224, 160), num_classes=1000)
    assert dilated == dataclasses.replace(config, kernel_size=7, dilations=(1, 2))
    assert all(size[0] % size[3] == 0 for size in SIZES.values())


@pytest.mark.parametrize("name", ["S", "S/", "S/x", "S/0", "XXL/16"])
def test_other_names_are_refused(name):
    with pytest.raises(ValueError, match=r"name: expected one of mu, nano.*S/16"):
        vit(name, (224, 224))


def test_patches_must_tile_the_image():
    with pytest.raises(ValueError, match=r"patch_size: expected a divisor.*got 3"):
        vit("mu/3", (9, 8))


def test_parameters_of_s16_are_those_of_the_paper():
    """22.05 million with 1000 classes; less the class token and its position."""
    config = vit("S/16", (224, 224), num_classes=1000)
    model = nnx.eval_shape(lambda: ViT(config, rngs=nnx.Rngs(0)))
    sizes = jax.tree.map(lambda x: x.size, nnx.state(model, nnx.Param))
    one_channel = 2 * 16 * 16 * 384  # of three
    count = sum(jax.tree.leaves(sizes)) + one_channel
    assert count == 22_050_664 - 2 * 384


def test_neighborhoods_as_large_as_the_grid_are_global():
    """With the same parameters, a window that holds every patch sees all of them."""
    sizes = {"d_model": 16, "num_layers": 1, "mlp_dim": 16, "num_heads": 2}
    config = ViTConfig((6, 6), 2, **sizes)
    local = dataclasses.replace(config, kernel_size=3)
    pictures = jax.random.normal(jax.random.key(0), (2, 6, 6))
    outputs = []
    for each in (config, local):
        model = ViT(each, rngs=nnx.Rngs(0))
        model.head.kernel[...] = jnp.eye(16, 10)
        outputs.append(jax.jit(model)(pictures))
    chex.assert_trees_all_close(*outputs, atol=1e-5)
    assert abs(outputs[0]).max() > 0.1


def test_dilation_alternates_over_the_depth():
    model = ViT(nat("nano/1", (8, 8), kernel_size=3), rngs=nnx.Rngs(0))
    mixers = [block.attention.mixer for block in model.blocks]
    assert [mixer.dilation for mixer in mixers] == [1, 2, 1, 2]
    assert {mixer.kernel_size for mixer in mixers} == {3}


def test_digits_are_split_by_class():
    data = images.digits()
    assert data.train[0].shape == (1437, 8, 8)
    assert data.test[0].shape == (360, 8, 8)
    counts = [np.bincount(labels, minlength=10) for _, labels in data]
    # Classes have 174 to 183 images: a fifth to within one of them.
    np.testing.assert_allclose(counts[1] / sum(counts), 0.2, atol=0.005)
    assert data.train[0].mean() == pytest.approx(0, abs=1e-5)
    assert data.train[0].std() == pytest.approx(1, abs=1e-5)
    # No image is in both.
    rows = [{image.tobytes() for image in part} for part, _ in data]
    assert not rows[0] & rows[1]


def test_mnist_is_there():
    data = images.mnist()
    assert [len(labels) for _, labels in data] == [4000, 1000]
    assert data.train[0].shape == (4000, 28, 28)
    assert (np.bincount(data.test[1]) == 100).all()


@functools.partial(jax.jit, static_argnums=(1, 2))
def moved_by(pictures, pixels, degrees):
    return images.move(
        pictures, max_shift=pixels, max_rotation=degrees, key=jax.random.key(0)
    )


def test_shifts_are_whole_pixels_and_bring_in_background():
    picture = jnp.zeros((64, 5, 5)).at[:, 2, 2].set(1.0).at[:, 0, 0].set(-1.0)
    moved = moved_by(picture, 2, 0)
    assert set(np.unique(moved)) == {-1.0, 0.0, 1.0}
    where = jnp.argwhere(moved == 1, size=64)
    assert (where[:, 0] == jnp.arange(64)).all()  # It stays within, on every image.
    assert set(np.unique(where[:, 1:])) == {0, 1, 2, 3, 4}
    still = moved[(where[:, 1:] == 2).all(1)]
    chex.assert_trees_all_equal(still, picture[: len(still)])


def test_rotations_turn_about_the_middle():
    ramp = jnp.broadcast_to(jnp.arange(5.0)[:, None] - 2, (32, 5, 5))
    turned = moved_by(ramp, 0, 30)
    inner = turned[:, 1:4, 1:4]
    chex.assert_trees_all_close(inner[:, 1, 1], jnp.zeros(32), atol=1e-6)
    down, right = inner[:, 2, 1], inner[:, 1, 2]
    chex.assert_trees_all_close(jnp.hypot(down, right), jnp.ones(32), atol=1e-5)
    angles = jnp.rad2deg(jnp.arctan2(right, down))
    assert abs(angles).max() <= 30.001
    assert angles.max() > 15
    assert angles.min() < -15


def test_training_learns_digits(tmp_path):
    experiment = dataclasses.replace(
        vision.EXPERIMENTS["digits-vit"],
        model=vit("mu/2", (8, 8)),
        training=TrainConfig(
            steps=90,
            learning_rate=1e-2,
            warmup_steps=10,
            save_every=90,
            validate_every=90,
            steps_per_call=30,
        ),
        batch_size=32,
    )
    task = experiment.task()
    first, second = task.batch(3), task.batch(4)
    chex.assert_trees_all_equal(first, task.batch(3))
    assert (first[1] != second[1]).any()
    model = train(task, experiment.training, tmp_path)
    measures = experiment.evaluate(model)
    last = read_metrics(tmp_path)[-1]
    assert last["validation"] == pytest.approx(measures["cross-entropy"])
    assert measures["accuracy"] > 0.3  # Chance would have 0.1.
