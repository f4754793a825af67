"""Layers: against the functions they compose, by steps, packed, trained, sharded."""

import functools
import itertools
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import normal
from jax.sharding import PartitionSpec as P

import attnx
from attnx import masks
from attnx.linear import feature_maps
from attnx.nn import (
    Attention,
    Hedgehog,
    LinearMixer,
    LogDecay,
    Mixer,
    NeighborhoodMixer,
    Rotary,
    SoftmaxMixer,
    SRMSNorm,
    TaylorMixer,
)

D, N, H, T = 32, 4, 8, 10
SLOPES = -(2.0 ** -jnp.arange(1.0, N + 1))


def kernel_init(key, shape, dtype):
    seed = np.asarray(jax.random.key_data(key))
    values = np.random.default_rng(seed).normal(size=shape)
    return jnp.asarray(values / shape[0] ** 0.5, dtype)


make = functools.partial(Attention, kernel_init=kernel_init)
FULL = {
    "num_kv_heads": 2,
    "value_dim": 12,
    "activation": jax.nn.silu,
    "position": Rotary(),
    "norm": SRMSNorm(),
    "gate": jax.nn.sigmoid,
}
MIXERS = {
    "causal": lambda rngs: SoftmaxMixer(scale=0.5),
    "streaming": lambda rngs: SoftmaxMixer(
        masks.Causal() & (masks.Window(3, 0) | masks.Prefix(2))
    ),
    "neighborhood": lambda rngs: NeighborhoodMixer(3, dilation=2, is_causal=True),
    "lightning": lambda rngs: LinearMixer(SLOPES, scale=1.0),
    "normalized": lambda rngs: LinearMixer(
        feature_map=feature_maps.elu_plus_one, normalize=True
    ),
    "decay per token": lambda rngs: LinearMixer(LogDecay(D, N, rngs=rngs)),
    "decay per channel": lambda rngs: LinearMixer(LogDecay(D, (N, H), rngs=rngs)),
    "taylor": lambda rngs: TaylorMixer(),
    "learned": lambda rngs: LinearMixer(
        nnx.Param(SLOPES),
        feature_map=Hedgehog(N, H),
        key_feature_map=Hedgehog(2, H),
        normalize=True,
    ),
}


@pytest.fixture(params=MIXERS)
def layer(request):
    """A layer with every part, for each mixer or those a test names."""
    return full(request.param)


def full(name, **kwargs):
    rngs = nnx.Rngs(0)
    return make(D, N, MIXERS[name](rngs), **FULL | kwargs, rngs=rngs)


def those(*names):
    return pytest.mark.parametrize("layer", names, indirect=True)


@jax.jit
def forward(layer, x, **kwargs):
    return layer(x, **kwargs)


@jax.jit
def step(layer, x, cache):
    return layer.step(x, cache)


def by_hand(layer, x, attend):
    """The layer of `FULL`, written out."""
    q, k, v, u = (
        jnp.einsum("btd,dnh->btnh", x, part.kernel[...]) + part.bias[...]
        for part in (layer.query, layer.key, layer.value, layer.gate)
    )
    q, k = (Rotary()(jax.nn.silu(y), jnp.arange(T)) for y in (q, k))
    y = attend(q, k, v).reshape(*x.shape[:2], -1)
    y = y / jnp.sqrt(jnp.mean(y**2, -1, keepdims=True) + 1e-6)
    y = y.reshape(u.shape) * jax.nn.sigmoid(u)
    return jnp.einsum("btnv,nvd->btd", y, layer.out.kernel[...]) + layer.out.bias[...]


def test_layer_composes_the_function_of_its_mixer(layer):
    mixer, x = layer.mixer, normal(0, (2, T, D))[0]

    def attend(q, k, v):
        if isinstance(mixer, SoftmaxMixer):
            return attnx.dot_product_attention(
                q, k, v, mask=mixer.mask, scale=mixer.scale, implementation="reference"
            )
        if isinstance(mixer, NeighborhoodMixer):
            return attnx.neighborhood_attention(
                *(q, k, v),
                kernel_size=3,
                dilation=2,
                is_causal=True,
                implementation="reference",
            )
        if isinstance(mixer, TaylorMixer):
            return attnx.taylor_attention(q, k, v, implementation="reference")
        decay = mixer.log_decay
        if isinstance(decay, LogDecay):
            low = x @ decay.down.kernel[...]
            up = jnp.tensordot(low, decay.up.kernel[...], 1) + decay.up.bias[...]
            decay = jax.nn.log_sigmoid(up) / 16
        elif isinstance(decay, nnx.Param):
            decay = decay[...]
        return attnx.linear_attention(
            mixer.feature_map(q),
            (mixer.key_feature_map or mixer.feature_map)(k),
            v,
            log_decay=decay,
            scale=mixer.scale,
            normalize=mixer.normalize,
            implementation="reference",
        )

    expected = jax.jit(lambda x: by_hand(layer, x, attend))(x)
    chex.assert_trees_all_close(forward(layer, x), expected, atol=2e-5)


def test_layer_is_flax_s_where_flax_has_it():
    kwargs = {"num_kv_heads": 2, "kernel_init": kernel_init}
    flax = nnx.MultiHeadAttention(N, D, decode=False, **kwargs, rngs=nnx.Rngs(0))
    ours = Attention(D, N, SoftmaxMixer(), **kwargs, rngs=nnx.Rngs(0))
    ours_state, flax_state = (
        nnx.to_pure_dict(nnx.state(ours)),
        nnx.to_pure_dict(nnx.state(flax)),
    )
    chex.assert_trees_all_equal(ours_state, flax_state)
    (x,) = normal(0, (2, T, D))
    expected = jax.jit(functools.partial(flax, is_causal=True))(x)
    chex.assert_trees_all_close(forward(ours, x), expected, atol=1e-5)


def test_steps_equal_the_whole(layer):
    (x,) = normal(0, (2, T, D))
    cache = layer.init_cache(2, 16)
    assert cache.lengths.tolist() == [0, 0]
    outputs, start = [], 0
    for size in (4, 1, 1, 4):
        y, cache = step(layer, x[:, start : start + size], cache)
        outputs.append(y)
        start += size
    chex.assert_trees_all_close(
        jnp.concatenate(outputs, 1), forward(layer, x), atol=1e-5
    )
    assert cache.lengths.tolist() == [T, T]


def test_rows_of_a_cache_may_differ_in_length():
    layer = full("causal")
    (x,) = normal(0, (2, T, D))
    _, cache = step(layer, x[:, :4], layer.init_cache(2, 16))
    # The first row forgets its last token and gets it again.
    cache = cache._replace(lengths=cache.lengths - jnp.array([1, 0]))
    y, cache = step(layer, jnp.stack([x[0, 3:4], x[1, 4:5]]), cache)
    whole = forward(layer, x)
    chex.assert_trees_all_close(y[0, 0], whole[0, 3], atol=1e-5)
    chex.assert_trees_all_close(y[1, 0], whole[1, 4], atol=1e-5)


def test_a_linear_cache_has_constant_size():
    layer = full("lightning")
    cache = layer.init_cache(2)
    _, after = step(layer, normal(0, (2, 4, D))[0], cache)
    chex.assert_trees_all_equal_shapes_and_dtypes(cache, after)
    chex.assert_shape(cache.state, (2, N, H, FULL["value_dim"]))


@those("causal", "neighborhood", "decay per channel", "learned")
def test_every_parameter_learns(layer):
    (x,) = normal(0, (2, T, D))

    @jax.jit
    @jax.grad
    def gradients(layer):
        return jnp.sum(jnp.sin(layer(x)))

    grads = nnx.to_flat_state(nnx.state(gradients(layer), nnx.Param))
    names = {".".join(map(str, path)) for path, _ in grads}
    assert {"query.kernel", "key.bias", "value.kernel", "gate.bias"} < names
    for path, grad in grads:
        assert jnp.isfinite(grad[...]).all(), path
        assert jnp.abs(grad[...]).max() > 1e-6, path


def test_a_decay_learns_only_as_a_parameter():
    @jax.jit
    @jax.grad
    def gradients(layer):
        return jnp.sum(jnp.sin(layer(normal(0, (1, T, D))[0])))

    for decay, learns in ((SLOPES, False), (nnx.Param(SLOPES), True)):
        grads = gradients(make(D, N, LinearMixer(decay), rngs=nnx.Rngs(0)))
        assert (jnp.abs(grads.mixer.log_decay[...]).max() > 1e-6) == learns


@pytest.mark.parametrize("name", ["causal", "lightning", "learned"])
def test_computes_in_bfloat16_with_float32_parameters(name):
    layer = full(name, dtype=jnp.bfloat16)
    chex.assert_type(jax.tree.leaves(nnx.state(layer, nnx.Param)), jnp.float32)
    cache = layer.init_cache(2, T)
    kept = jnp.float32 if hasattr(cache, "state") else jnp.bfloat16
    chex.assert_type(cache[0], kept)
    (x,) = normal(0, (2, T, D))
    y, cache = step(layer, x, cache)
    chex.assert_type(cache[0], kept)
    assert y.dtype == jnp.bfloat16
    chex.assert_trees_all_close(
        y.astype(jnp.float32), forward(full(name), x), atol=0.05
    )


class Absolute:
    """A position that is not relative: it must restart where documents do."""

    def __call__(self, x, positions):
        return x * (1 + 0.1 * positions[..., None, None])


@pytest.mark.parametrize("name", ["causal", "streaming", "decay per token"])
def test_packed_documents_are_the_documents(name):
    layer = full(name, position=Absolute())
    if name == "streaming":  # Prefixes count from the start of the row.
        layer.mixer = SoftmaxMixer(masks.Window(3, 2))
    (x,) = normal(0, (2, T, D))
    cuts = [(0, 4, 7, T), (0, 3, 7, T)]
    ids = [[5] * a + [2] * (b - a) + [9] * (c - b) for _, a, b, c in cuts]
    packed = forward(layer, x, segment_ids=jnp.array(ids))
    for row, ends in enumerate(cuts):
        for start, end in itertools.pairwise(ends):
            alone = forward(layer, x[row : row + 1, start:end])
            chex.assert_trees_all_close(
                packed[row : row + 1, start:end], alone, atol=1e-5
            )


def test_neighborhoods_of_images_with_rotary_axes():
    mixer = NeighborhoodMixer([3, 2], stride=(2, 1), is_causal=[False, True])
    layer = make(D, N, mixer, position=Rotary(), rngs=nnx.Rngs(0))
    (x,) = normal(0, (2, 5, 6, D))

    @jax.jit
    def by_hand(x):
        q, k = (Rotary()(p(x), *np.ogrid[:5, :6]) for p in (layer.query, layer.key))
        y = attnx.neighborhood_attention(
            *(q, k, layer.value(x)),
            kernel_size=(3, 2),
            stride=(2, 1),
            is_causal=(False, True),
            implementation="reference",
        )
        return layer.out(y)

    chex.assert_trees_all_close(forward(layer, x), by_hand(x), atol=1e-5)


class Doubling:
    """Makes heads twice as long, as LRPE does, but by absolute positions."""

    def __call__(self, x, positions):
        return jnp.concatenate([x, 0.1 * x * positions[..., None, None]], -1)


@pytest.mark.parametrize("mixer", [SoftmaxMixer(), LinearMixer()])
def test_a_position_may_change_the_head_size(mixer):
    layer = make(D, N, mixer, position=Doubling(), rngs=nnx.Rngs(0))
    (x,) = normal(0, (1, T, D))
    cache = layer.init_cache(1, T)
    y, cache = step(layer, x[:, :4], cache)
    chex.assert_trees_all_close(y, forward(layer, x)[:, :4], atol=1e-5)
    assert 2 * H in cache[0].shape


def test_metadata_reaches_the_parameters():
    rngs = nnx.Rngs(0)
    mesh = jax.make_mesh((1,), ("model",), axis_types=(jax.sharding.AxisType.Auto,))
    metadata = {
        "kernel_metadata": {"out_sharding": P(None, "model", None)},
        "bias_metadata": {"out_sharding": P("model", None)},
        "out_kernel_metadata": {"out_sharding": P("model", None, None)},
        "out_bias_metadata": {"note": "mine"},
    }
    decay = LogDecay(D, N, kernel_metadata={"a": 1}, bias_metadata={"b": 2}, rngs=rngs)
    hedgehog = Hedgehog(N, H, kernel_metadata={"c": 3})
    mixer = LinearMixer(decay, feature_map=hedgehog)
    with jax.set_mesh(mesh):
        layer = make(D, N, mixer, gate=jax.nn.silu, **metadata, rngs=rngs)
    assert layer.query.kernel[...].sharding.spec == P(None, "model", None)
    for part in (layer.query, layer.key, layer.value, layer.gate):
        kernel, bias = part.kernel.get_metadata(), part.bias.get_metadata()
        assert kernel["out_sharding"] == P(None, "model", None)
        assert bias["out_sharding"] == P("model", None)
    out = layer.out
    assert out.kernel.get_metadata()["out_sharding"] == P("model", None, None)
    assert out.bias.get_metadata()["note"] == "mine"
    assert decay.up.kernel.get_metadata()["a"] == 1
    assert decay.up.bias.get_metadata()["b"] == 2
    assert hedgehog.kernel.get_metadata()["c"] == 3


def test_layers_built_alike_are_one_to_jit():
    traces = []

    @jax.jit
    def call(layer, x):
        traces.append(layer)
        return layer(x)

    def new():
        mask = masks.Causal() & masks.Window(3, 0)
        return make(D, N, SoftmaxMixer(mask), rngs=nnx.Rngs(0))

    first, second = new(), new()
    chex.assert_trees_all_equal(
        call(first, normal(0, (1, T, D))[0]), call(second, normal(0, (1, T, D))[0])
    )
    assert len(traces) == 1
    assert not jax.tree.leaves(first.mixer)  # The window is known where jit traces.


def test_arrays_in_a_mask_are_arrays_to_jit():
    (x,) = normal(0, (2, T, D))

    def new(length):
        mask = masks.Causal() | masks.Prefix(length)
        return make(D, N, SoftmaxMixer(mask), rngs=nnx.Rngs(0))

    each = forward(new(jnp.array([2, 5])), x)
    for row, length in enumerate((2, 5)):
        alone = forward(new(length), x[row : row + 1])
        chex.assert_trees_all_close(each[row : row + 1], alone, atol=1e-5)


@those("learned")
def test_layers_are_modules_to_nnx(layer):
    (x,) = normal(0, (2, T, D))
    copy = nnx.merge(*nnx.split(layer))
    chex.assert_trees_all_equal(
        nnx.jit(lambda layer, x: layer(x))(copy, x), forward(layer, x)
    )


def test_explain_sees_through_a_layer():
    layer = make(D, N, SoftmaxMixer(), rngs=nnx.Rngs(0))
    why = attnx.explain(layer, jax.ShapeDtypeStruct((2, T, D), jnp.float32))
    assert [d.mechanism for d in why.decisions] == ["dot_product_attention"]


def test_a_mixer_of_one_s_own():
    class Mean(Mixer):
        def __call__(self, query, key, value, *, inputs=None, segment_ids=None):
            return jnp.broadcast_to(value.mean(1, keepdims=True), value.shape)

    layer = make(D, N, Mean(), rngs=nnx.Rngs(0))
    (x,) = normal(0, (1, T, D))
    chex.assert_trees_all_close(layer(x), layer(x[:, ::-1]), atol=1e-5)
    with pytest.raises(NotImplementedError, match="Mean cannot generate by steps"):
        layer.init_cache(1, T)


def test_functions_do_not_import_flax():
    code = "import attnx, sys; assert 'flax' not in sys.modules, 'flax'"
    subprocess.run([sys.executable, "-c", code], check=True)
