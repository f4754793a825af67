"""dot_product_attention: the definition, jax.nn's contract, and every gradient."""

import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_matches, normal, relative_rms
from hypothesis import given
from hypothesis import strategies as st

import attnx
from attnx import masks

IMPLEMENTATIONS = ("reference", "xla")
B, T, S, N, K, H, V = 2, 150, 300, 4, 2, 16, 24
RANDOM = np.random.default_rng(0)
SEGMENTS = np.sort(RANDOM.integers(0, 4, (B, T)))
KEY_SEGMENTS = np.sort(RANDOM.integers(0, 4, (B, S)))

CASES = {
    "full": {},
    "causal": {"is_causal": True},
    "window": {"local_window_size": (20, 5)},
    "window, causal": {"local_window_size": 40, "is_causal": True},
    "lengths": {
        "query_seq_lengths": jnp.array([100, 150]),
        "key_value_seq_lengths": jnp.array([0, 170]),
    },
    "segments": {"mask": masks.Causal() & masks.Segments(SEGMENTS, KEY_SEGMENTS)},
    "boolean": {"mask": RANDOM.random((B, N, T, S)) < 0.05},
    "boolean, a head": {"mask": RANDOM.random((N, T, S)) < 0.3},
    "boolean, a key": {"mask": RANDOM.random((B, 1, 1, S)) < 0.3},
    "prefix": {"mask": masks.Causal() | masks.Prefix(jnp.array([9, 200]))},
    "a head": {"mask": masks.Window(jnp.array([0, 9, 40, 300]), 2)},
    "from_fn": {"mask": masks.from_fn(lambda b, n, i, j: (i + 2 * j + n) % 7 == b)},
    "scale": {"scale": 0.3},
}
BIASES = {
    "bias": (B, N, T, S),
    "bias, a head": (N, T, S),
    "bias, a key": (B, 1, 1, S),
    "bias, a query": (1, N, T, 1),
}


def arrays(dtype=jnp.float32):
    return normal(0, (B, T, N, H), (B, S, K, H), (B, S, K, V), dtype=dtype)


def attention(implementation, **options):
    def fn(query, key, value, bias=None):
        return attnx.dot_product_attention(
            query,
            key,
            value,
            bias,
            implementation=implementation,
            return_residual=True,
            **options,
        )

    return fn


@pytest.mark.parametrize("case", CASES)
def test_xla_matches_the_reference(case):
    options = CASES[case]
    assert_matches(
        attention("xla", **options), attention("reference", **options), arrays()
    )


@pytest.mark.parametrize("case", BIASES)
def test_bias_and_its_gradient(case):
    (bias,) = normal(1, BIASES[case])
    assert_matches(
        attention("xla", is_causal=True),
        attention("reference", is_causal=True),
        (*arrays(), bias),
    )


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_half_precision(implementation, dtype):
    assert_matches(
        attention(implementation, is_causal=True),
        attention("reference", is_causal=True),
        arrays(dtype),
    )
    out, lse = attention(implementation)(*arrays(dtype))
    assert (out.dtype, lse.dtype) == (dtype, jnp.float32)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"is_causal": True},
        {"local_window_size": (300, 7), "scale": 0.2},
        {"mask": RANDOM.random((B, N, T, S)) < 0.5, "bias": RANDOM.random((N, T, S))},
        {"key_value_seq_lengths": np.array([3, 300], np.int32)},
    ],
)
def test_agrees_with_jax_nn(implementation, options):
    query, key, _ = arrays()
    (value,) = normal(2, key.shape)
    want = jax.nn.dot_product_attention(query, key, value, **options)
    got = attnx.dot_product_attention(
        query, key, value, implementation=implementation, **options
    )
    assert relative_rms(got, want) < 1e-6


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_without_a_batch(implementation):
    query, key, value = arrays()
    whole, whole_lse = attention(implementation)(query, key, value)
    out, lse = attention(implementation)(query[0], key[0], value[0])
    chex.assert_trees_all_close(out, whole[0], atol=1e-6)
    chex.assert_trees_all_close(lse, whole_lse[0], atol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_query_that_sees_nothing_gives_nothing(implementation):
    query, key, value = arrays()
    blind = masks.from_fn(lambda b, n, i, j: (i != 70) & (j < 50))

    def fn(query, key, value):
        return attention(implementation, mask=blind)(query, key, value)

    (out, lse), pull = jax.vjp(fn, query, key, value)
    chex.assert_trees_all_equal(out[:, 70], jnp.zeros_like(out[:, 70]))
    assert (lse[:, 70] == -jnp.inf).all()
    d_query, d_key, d_value = pull((jnp.ones_like(out), jnp.ones_like(lse)))
    chex.assert_tree_all_finite((d_query, d_key, d_value))
    assert not d_query[:, 70].any()
    assert not d_key[:, 50:].any()
    assert not d_value[:, 50:].any()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@given(token=st.integers(0, T - 1))
def test_the_future_never_changes_the_past(implementation, token):
    query, key, value = arrays()
    window = {"local_window_size": (60, 0), "implementation": implementation}
    before = CAUSAL(query, key[:, :T], value[:, :T], **window)
    changed = (x.at[:, token].set(9.0) for x in (query, key[:, :T], value[:, :T]))
    after = CAUSAL(*changed, **window)
    chex.assert_trees_all_equal(after[:, :token], before[:, :token])
    assert (after[:, token] != before[:, token]).any()


def test_packed_documents_equal_each_alone():
    cuts = [0, 1, 60, 130, T]
    query, _, _ = arrays()
    key, value = normal(3, (B, T, K, H), (B, T, K, V))
    ids = np.repeat(np.arange(4), np.diff(cuts))
    mask = masks.Causal() & masks.Segments(jnp.asarray(ids))
    packed = attention("xla", mask=mask)(query, key, value)
    alone = [
        attention("xla", is_causal=True)(*(x[:, a:b] for x in (query, key, value)))
        for a, b in itertools.pairwise(cuts)
    ]
    alone = [jnp.concatenate(parts, 1) for parts in zip(*alone, strict=True)]
    chex.assert_trees_all_close(packed, tuple(alone), atol=2e-6)


def test_one_program_serves_other_masks_of_the_same_shape():
    query, key, value = arrays()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def fn(query, mask):
        return attnx.dot_product_attention(query, key, value, mask=mask)

    for left in (3, 200):
        mask = masks.Window(jnp.array(left), 0)
        want = attention("reference", mask=mask)(query, key, value)[0]
        chex.assert_trees_all_close(fn(query, mask), want, atol=2e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_under_vmap_remat_and_scan(implementation):
    query, key, value = arrays()

    def loss(query):
        fn = attention(implementation, is_causal=True)
        return sum(jnp.sin(x).sum() for x in fn(query[None], key[:1], value[:1]))

    want = jnp.stack([jax.grad(loss)(x) for x in query])
    mapped = jax.jit(jax.vmap(jax.grad(jax.checkpoint(loss))))(query)
    chex.assert_trees_all_close(mapped, want, atol=1e-5)
    _, scanned = jax.lax.scan(lambda c, x: (c, jax.grad(loss)(x)), None, query)
    chex.assert_trees_all_close(scanned, want, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_traced_scale_has_a_gradient(implementation):
    query, key, value = arrays()

    def loss(scale):
        out, lse = attention(implementation, scale=scale)(query, key, value)
        return jnp.sin(out).sum() + lse.sum()

    step = 1e-2
    slope = (loss(0.3 + step) - loss(0.3 - step)) / (2 * step)
    got = jax.jit(jax.grad(loss))(jnp.array(0.3))
    assert abs(got - slope) < 2e-3 * abs(slope)


def test_memory_follows_the_window():
    """No array of T x T bytes, forward or backward."""
    length = 4096
    shapes = [jax.ShapeDtypeStruct((1, length, 2, 16), jnp.float32)] * 3

    def loss(query, key, value):
        return attnx.dot_product_attention(
            query, key, value, local_window_size=(256, 0), implementation="xla"
        ).sum()

    compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*shapes).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < length * length / 2


QUERY, KEY, VALUE = arrays()
BAD = {
    "rank": ((QUERY[0, 0], KEY, VALUE), {}, r"query: expected \[B, T, N, H\] or"),
    "ranks": ((QUERY, KEY[0], VALUE), {}, "key: expected 4 axes like query"),
    "head size": ((QUERY, KEY[..., :8], VALUE), {}, "key: expected shape"),
    "lengths differ": ((QUERY, KEY, VALUE[:, :9]), {}, "value: expected shape"),
    "batch": ((QUERY, KEY[:1], VALUE[:1]), {}, "key: expected shape"),
    "heads": ((QUERY[:, :, :3], KEY, VALUE), {}, "divides query's 3, got 2"),
    "integers": ((QUERY.astype(int), KEY, VALUE), {}, "query: expected a floating"),
    "dtypes": ((QUERY, KEY.astype("bfloat16"), VALUE), {}, "key: expected query's"),
    "no keys": ((QUERY, KEY[:, :0], VALUE[:, :0]), {}, "at least one token"),
    "window": ((QUERY, KEY, VALUE), {"local_window_size": (-1, 0)}, "at least 0"),
    "mask shape": ((QUERY, KEY, VALUE, None, np.ones((3, S), bool)), {}, "mask: exp"),
    "mask dtype": ((QUERY, KEY, VALUE, None, np.ones((T, S))), {}, "boolean array or"),
    "bias shape": ((QUERY, KEY, VALUE, np.ones((T, 7))), {}, "bias: expected broad"),
    "bias dtype": ((QUERY, KEY, VALUE, np.ones((T, S), int)), {}, "bias: expected a"),
    "lengths": (
        (QUERY, KEY, VALUE),
        {"query_seq_lengths": jnp.array([1])},
        r"query_seq_lengths: expected shape \(2,\)",
    ),
    "implementation": (
        (QUERY, KEY, VALUE),
        {"implementation": "cudnn"},
        "implementation: expected None or one of 'reference', 'xla', 'pallas', got 'cu",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    args, options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        attnx.dot_product_attention(*args, **options)


CAUSAL = jax.jit(
    lambda query, key, value, **options: attnx.dot_product_attention(
        query, key, value, is_causal=True, **options
    ),
    static_argnames=("local_window_size", "implementation"),
)
