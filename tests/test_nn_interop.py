"""attnx functions inside flax's attention layers, against flax's own function."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from helpers import normal

from attnx import dot_product_attention, linear_attention, masks, neighborhood_attention
from attnx.nn import attention_fn

# The adapter is what is tested: the reference compiles fastest.
reference = {"implementation": "reference"}
dense = functools.partial(dot_product_attention, **reference)
ours = attention_fn(dense)


def kernel_init(key, shape, dtype):
    """As good as random, and traceable: Linen initializes under a trace."""
    start = jax.random.key_data(key)[-1] % 1000
    chirp = jnp.sin(start + 0.7 * jnp.arange(np.prod(shape)) ** 2)
    return (chirp.reshape(shape) / shape[0] ** 0.5).astype(dtype)


def run(layer, *arrays, **kwargs):
    """Calls a layer compiled as one: eagerly each operation compiles by itself."""
    return jax.jit(functools.partial(layer, **kwargs))(*arrays)


def layers(library, **kwargs):
    """The layer as flax makes it and the same layer with our function: `fn(x, **)`."""
    kwargs["kernel_init"] = kernel_init
    if library == "nnx":
        kwargs = {"num_heads": 4, "in_features": 16, "decode": False} | kwargs
        return tuple(
            nnx.MultiHeadAttention(**kwargs, **fn, rngs=nnx.Rngs(0))
            for fn in ({}, {"attention_fn": ours})
        )

    def bind(fn):
        layer = linen.MultiHeadDotProductAttention(num_heads=4, **kwargs, **fn)
        init = layer.clone(dropout_rate=0.0)
        variables = init.init(jax.random.key(0), jnp.ones((1, 16)))
        return lambda *args, **kw: layer.apply(variables, *args, **kw)

    return bind({}), bind({"attention_fn": ours})


@pytest.fixture(params=["nnx", "linen"])
def library(request):
    return request.param


@pytest.mark.parametrize(
    ("shape", "mask"),
    [
        ((2, 9, 16), None),
        ((2, 9, 16), "causal"),
        ((2, 3, 9, 16), "padding"),
        ((2, 3, 9, 16), "shared"),
        ((9, 16), "causal"),
    ],
)
def test_serves_as_the_default_function(library, shape, mask):
    default, layer = layers(library)
    (x,) = normal(0, shape)
    if mask == "causal":
        mask = nnx.make_causal_mask(x[..., 0])
        assert mask.dtype == jnp.float32  # flax's masks are numbers.
    elif mask == "padding":
        real = jnp.broadcast_to(jnp.arange(shape[-2]) < 5, shape[:-1])
        mask = nnx.make_attention_mask(jnp.ones(shape[:-1]), real, dtype=bool)
    elif mask == "shared":
        mask = jnp.tril(jnp.ones((1, 1, 1, 9, 9), bool))
    chex.assert_trees_all_close(
        run(layer, x, mask=mask), run(default, x, mask=mask), atol=1e-5
    )


@pytest.mark.parametrize("kwargs", [{}, {"num_kv_heads": 2, "normalize_qk": True}])
def test_is_causal_and_its_gradients(kwargs):
    default, layer = layers("nnx", **kwargs)
    (x,) = normal(0, (2, 9, 16))

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradients(layer, x):
        return jnp.sum(jnp.sin(layer(x, is_causal=True)))

    chex.assert_trees_all_close(
        run(layer, x, is_causal=True), run(default, x, is_causal=True), atol=1e-5
    )
    expected, expected_x = gradients(default, x)
    got, got_x = gradients(layer, x)
    chex.assert_trees_all_close(
        nnx.to_pure_dict(nnx.state(got)),
        nnx.to_pure_dict(nnx.state(expected)),
        atol=1e-5,
    )
    chex.assert_trees_all_close(got_x, expected_x, atol=1e-5)


def test_decoding_equals_the_causal_layer():
    _, layer = layers("nnx", decode=True)
    (x,) = normal(0, (2, 5, 16))
    whole = run(layer, x, decode=False, is_causal=True)
    layer.init_cache((2, 5, 16))
    step = nnx.jit(lambda layer, x: layer(x))
    for t in range(5):
        y = step(layer, x[:, t : t + 1])
        chex.assert_trees_all_close(y, whole[:, t : t + 1], atol=1e-5)


def test_decoding_in_linen():
    layer = linen.MultiHeadDotProductAttention(
        4, kernel_init=kernel_init, attention_fn=ours, decode=True
    )
    (x,) = normal(0, (2, 5, 16))
    variables = run(layer.init, jax.random.key(0), x)
    params, cache = variables["params"], variables["cache"]
    whole = run(
        linen.MultiHeadDotProductAttention(4).apply,
        {"params": params},
        x,
        mask=linen.make_causal_mask(x[..., 0]),
    )
    step = jax.jit(functools.partial(layer.apply, mutable=["cache"]))
    for t in range(5):
        y, updates = step({"params": params, "cache": cache}, x[:, t : t + 1])
        cache = updates["cache"]
        chex.assert_trees_all_close(y, whole[:, t : t + 1], atol=1e-5)


def test_the_layer_s_dtype_is_the_function_s(library):
    default, layer = layers(library, dtype=jnp.bfloat16)
    (x,) = normal(0, (2, 9, 16))
    y = run(layer, x)
    assert y.dtype == jnp.bfloat16
    chex.assert_trees_all_close(y, run(default, x), atol=2e-2)
    seen = []

    def record(query, key, value):
        seen.extend(x.dtype for x in (query, key, value))
        return query

    attention_fn(record)(*3 * [jnp.ones((1, 2, 1, 4))], dtype=jnp.bfloat16)
    mixed = [jnp.ones((1, 2, 1, 4), dtype) for dtype in ("bfloat16", "float32")]
    attention_fn(record)(*mixed, mixed[0])
    assert seen == 3 * [jnp.bfloat16] + 3 * [jnp.float32]


def test_a_bias_reaches_the_function():
    q, k, v = normal(0, *[(2, 3, 5, 4, 8)] * 3)
    (bias,) = normal(0, (3, 4, 5, 5))
    expected = run(linen.dot_product_attention, q, k, v, bias=bias)
    chex.assert_trees_all_close(run(ours, q, k, v, bias=bias), expected, atol=1e-5)


def test_a_query_that_sees_nothing_gives_zero():
    q, k, v = normal(0, *[(1, 5, 4, 8)] * 3)
    chex.assert_trees_all_equal(
        run(ours, q, k, v, mask=jnp.zeros((5, 5), bool)), jnp.zeros_like(v)
    )


def test_linear_attention_in_a_layer():
    fn = functools.partial(
        linear_attention, scale=1.0, log_decay=-jnp.arange(4.0), **reference
    )
    layer = nnx.MultiHeadAttention(
        4,
        16,
        decode=False,
        attention_fn=attention_fn(fn),
        kernel_init=kernel_init,
        rngs=nnx.Rngs(0),
    )
    (x,) = normal(0, (2, 9, 16))
    expected = run(
        lambda x: layer.out(fn(layer.query(x), layer.key(x), layer.value(x))), x
    )
    chex.assert_trees_all_close(run(layer, x), expected, atol=1e-6)


def test_neighborhoods_of_an_image_in_a_layer():
    fn = functools.partial(neighborhood_attention, kernel_size=3, **reference)
    layer = nnx.MultiHeadAttention(
        4,
        16,
        decode=False,
        attention_fn=attention_fn(fn, rank=2),
        kernel_init=kernel_init,
        rngs=nnx.Rngs(0),
    )
    (x,) = normal(0, (2, 5, 6, 16))
    expected = run(
        lambda x: layer.out(fn(layer.query(x), layer.key(x), layer.value(x))), x
    )
    chex.assert_trees_all_close(run(layer, x), expected, atol=1e-6)
    several = jnp.stack([x, -x])
    chex.assert_trees_all_close(run(layer, several)[0], expected, atol=1e-5)


def test_the_fastest_implementation_under_jit():
    default, layer = layers("nnx")
    layer.attention_fn = attention_fn(dot_product_attention)
    (x,) = normal(0, (2, 9, 16))
    chex.assert_trees_all_close(
        run(layer, x, is_causal=True), run(default, x, is_causal=True), atol=1e-5
    )


def test_a_mask_of_ours_in_a_layer(library):
    default, _ = layers(library)
    (x,) = normal(0, (2, 9, 16))
    window = masks.Window(2, 1)
    expected = run(default, x, mask=window.to_dense(9, 9))
    fn = attention_fn(functools.partial(dense, mask=window))
    if library == "nnx":
        default.attention_fn = fn
        chex.assert_trees_all_close(run(default, x), expected, atol=1e-5)
    else:
        layer = linen.MultiHeadDotProductAttention(
            4, kernel_init=kernel_init, attention_fn=fn
        )
        variables = layer.init(jax.random.key(0), jnp.ones((1, 16)))
        chex.assert_trees_all_close(run(layer.apply, variables, x), expected, atol=1e-5)


def test_dropout_is_refused_in_training_only(library):
    _, layer = layers(library, dropout_rate=0.5)
    x = jnp.ones((2, 9, 16))
    rngs = {"dropout": jax.random.key(0)}
    rngs = {"rngs": nnx.Rngs(**rngs) if library == "nnx" else rngs}
    assert run(layer, x, deterministic=True, **rngs).shape == x.shape
    with pytest.raises(NotImplementedError, match="dropout_rate"):
        layer(x, deterministic=False, **rngs)


REFUSED = {
    "module": {"module": object()},
    "precision": {"precision": jax.lax.Precision.HIGHEST},
    "einsum": {"qk_attn_weights_einsum": jnp.einsum},
    "input_positions": {"input_positions": jnp.arange(9)},
}


@pytest.mark.parametrize("argument", REFUSED)
def test_refuses_what_it_cannot_honour(argument):
    q = jnp.ones((2, 9, 4, 16))
    with pytest.raises(NotImplementedError, match=f"dot_product_attention.*{argument}"):
        ours(q, q, q, **REFUSED[argument])
    assert ours(q, q, q, precision=jax.lax.Precision.DEFAULT).shape == q.shape


def test_refuses_what_the_function_does_not_take():
    q = jnp.ones((2, 9, 4, 16))
    mask = jnp.ones((9, 9), bool)
    with pytest.raises(NotImplementedError, match=r"linear_attention.*mask"):
        attention_fn(functools.partial(linear_attention, scale=1.0))(q, q, q, mask=mask)
    window = functools.partial(dot_product_attention, mask=masks.Window(2, 0))
    with pytest.raises(NotImplementedError, match="mask"):
        attention_fn(window)(q, q, q, mask=mask)


def test_sown_weights_are_refused(library):
    _, layer = layers(library)
    with pytest.raises(NotImplementedError, match="sow"):
        layer(jnp.ones((2, 9, 16)), sow_weights=True)


def test_bad_arguments():
    with pytest.raises(ValueError, match="rank: expected at least 1, got 0"):
        attention_fn(dot_product_attention, rank=0)
    with pytest.raises(ValueError, match="query: expected rank 4 or more, got 3"):
        attention_fn(neighborhood_attention, rank=2)(*3 * [jnp.ones((5, 4, 8))])
