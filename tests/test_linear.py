"""linear_attention: every decay, every option, every gradient."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_matches, normal
from hypothesis import given
from hypothesis import strategies as st

import attnx

IMPLEMENTATIONS = ("reference", "xla")
B, T, N, K, H, V = 2, 150, 4, 2, 16, 24
# A boundary inside a chunk, one on a chunk's edge, and a document of one token.
SEGMENTS = np.repeat(np.arange(4), [50, 14, 1, 85])
SEGMENTS = np.stack([SEGMENTS, SEGMENTS[::-1] + 7])
DECAYS = {
    "none": None,
    "head": (N,),
    "token": (B, T, N),
    "channel": (B, T, N, H),
}
OPTIONS = {
    "plain": {},
    "reverse": {"reverse": True},
    "segments": {"segment_ids": SEGMENTS},
    "segments, reverse": {"segment_ids": SEGMENTS, "reverse": True},
    "normalize": {"normalize": True},
    "scale": {"scale": 1.0},
}


def attention(implementation, decay, **options):
    """A function of arrays: the decay, if there is one, is made at most 0."""

    def fn(query, key, value, initial_state, log_decay=None):
        if options.get("normalize"):
            query, key = jnp.exp(query / 4), jnp.exp(key / 4)
            initial_state = jnp.abs(initial_state)
        return attnx.linear_attention(
            query,
            key,
            value,
            log_decay=None if log_decay is None else -jnp.abs(log_decay) * decay,
            initial_state=initial_state,
            implementation=implementation,
            return_state=True,
            **options,
        )

    return fn


def arrays(decay, *, length=T, normalize=False, dtype=jnp.float32, batch=B):
    shapes = [(batch, length, N, H), (batch, length, K, H), (batch, length, K, V)]
    shapes += [(batch, N, H, V + normalize)]
    if DECAYS[decay] is not None:
        shape = DECAYS[decay]
        shapes += [shape if len(shape) == 1 else (batch, length, *shape[2:])]
    return normal(0, *shapes, dtype=dtype)


@pytest.mark.parametrize(
    ("decay", "options"),
    [
        *itertools.product(DECAYS, ("plain", "segments, reverse", "normalize")),
        *itertools.product(["token"], ("reverse", "segments", "scale")),
    ],
)
def test_xla_matches_the_reference(decay, options):
    options = OPTIONS[options]
    fns = (attention(name, 0.3, **options) for name in ("xla", "reference"))
    normalize = options.get("normalize", False)
    assert_matches(*fns, arrays(decay, normalize=normalize))


@pytest.mark.parametrize("decay", ["head", "channel"])
@pytest.mark.parametrize("length", [1, 5, 64])
def test_any_length(decay, length):
    fns = (attention(name, 0.3) for name in ("xla", "reference"))
    assert_matches(*fns, arrays(decay, length=length))


@pytest.mark.parametrize("decay", ["head", "token", "channel"])
def test_strong_decay_neither_overflows_nor_vanishes(decay):
    """e^-8 a token: e^-G of a chunk would be e^512."""
    fns = (attention(name, 8.0) for name in ("xla", "reference"))
    # The decay's own gradient is tiny beside what it is a difference of.
    assert_matches(*fns, arrays(decay), gradient_error=2e-5)


@pytest.mark.parametrize("decay", DECAYS)
def test_half_precision(decay):
    fns = (attention(name, 0.1) for name in ("xla", "reference"))
    assert_matches(*fns, arrays(decay, dtype=jnp.bfloat16))


def test_a_long_sum_without_decay_stays_exact():
    """A bfloat16 state would lose the newest tokens among thousands of old ones."""
    inputs = normal(1, *[(1, 4096, 1, 16)] * 3, dtype=jnp.bfloat16)
    fns = (
        functools.partial(
            attnx.linear_attention, implementation=name, return_state=True
        )
        for name in ("xla", "reference")
    )
    assert_matches(*fns, inputs)


@pytest.mark.parametrize("decay", ["none", "channel"])
@pytest.mark.parametrize("cut", [1, 77])
def test_a_sequence_can_be_cut_anywhere(decay, cut):
    query, key, value, state, *rest = arrays(decay)
    fn = attention("xla", 0.2)
    whole = fn(query, key, value, state, *rest)
    outputs = []
    for part in (slice(0, cut), slice(cut, T)):
        tokens = (x[:, part] for x in (query, key, value))
        log_decay = [x if x.ndim == 1 else x[:, part] for x in rest]
        out, state = fn(*tokens, state, *log_decay)
        outputs.append(out)
    chex.assert_trees_all_close(
        (jnp.concatenate(outputs, 1), state), whole, atol=5e-5, rtol=1e-5
    )


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("reverse", [False, True])
def test_packed_documents_equal_each_alone(implementation, reverse):
    query, key, value, state, log_decay = arrays("token", batch=1)
    fn = attention(implementation, 0.2, reverse=reverse)
    packed = attention(implementation, 0.2, reverse=reverse, segment_ids=SEGMENTS[:1])(
        query, key, value, state, log_decay
    )
    edges = [0, 50, 64, 65, T]
    outputs = {}
    for i in reversed(range(4)) if reverse else range(4):
        part = slice(edges[i], edges[i + 1])
        tokens = (x[:, part] for x in (query, key, value))
        first = i == (3 if reverse else 0)
        outputs[i], last = fn(
            *tokens, state if first else 0 * state, log_decay[:, part]
        )
    want = jnp.concatenate([outputs[i] for i in range(4)], 1)
    chex.assert_trees_all_close(packed, (want, last), atol=2e-5)


@given(token=st.integers(0, T - 1))
def test_the_future_never_changes_the_past(token):
    query, key, value, state, log_decay = arrays("channel")
    before, _ = JITTED(query, key, value, state, log_decay)
    tokens = [query, key, value, log_decay]
    query, key, value, log_decay = (x.at[:, token].set(9.0) for x in tokens)
    after, _ = JITTED(query, key, value, state, log_decay)
    chex.assert_trees_all_equal(after[:, :token], before[:, :token])
    assert (after[:, token] != before[:, token]).any()


def test_no_decay_is_causal_attention_without_softmax():
    query, key, value, *_ = arrays("none")
    key, value = (jnp.repeat(x, N // K, 2) for x in (key, value))
    scores = jnp.einsum("btnh,bsnh->bnts", query, key) * H**-0.5
    want = jnp.einsum("bnts,bsnv->btnv", jnp.tril(scores), value)
    got = attnx.linear_attention(query, key, value)
    chex.assert_trees_all_close(got, want, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_denominator_of_zero_gives_zero(implementation):
    query, key, value, *_ = arrays("none")

    def fn(key):
        return attnx.linear_attention(
            jnp.abs(query), key, value, normalize=True, implementation=implementation
        )

    out, pull = jax.vjp(fn, jnp.zeros_like(key))
    chex.assert_trees_all_equal(out, jnp.zeros_like(out))
    chex.assert_tree_all_finite(pull(jnp.ones_like(out)))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_under_vmap_remat_and_scan_and_without_a_batch(implementation):
    query, key, value, state, log_decay = arrays("token")

    def loss(tokens):
        out, state = attention(implementation, 0.2)(*tokens)
        return jnp.sin(out).sum() + jnp.sin(state).sum()

    batch = (query, key, value, state, log_decay)
    want = jax.grad(loss)(batch)
    mapped = jax.jit(jax.vmap(jax.grad(jax.checkpoint(loss))))(batch)
    chex.assert_trees_all_close(mapped, want, atol=1e-4)
    _, scanned = jax.lax.scan(lambda c, x: (c, jax.grad(loss)(x)), None, batch)
    chex.assert_trees_all_close(scanned, want, atol=1e-4)


def test_memory_follows_the_length():
    def temporaries(length):
        shapes = [jax.ShapeDtypeStruct((1, length, 2, 32), jnp.float32)] * 3

        def loss(*tokens):
            return attnx.linear_attention(*tokens, implementation="xla").sum()

        compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(*shapes).compile()
        return compiled.memory_analysis().temp_size_in_bytes

    assert temporaries(8192) < 2.2 * temporaries(4096)


X = jnp.zeros((B, T, N, H))
BAD = {
    "rank": ((X[0, 0], X, X), {}, "query: expected rank 3 or 4"),
    "ranks": ((X, X[0], X), {}, "key: expected query's rank"),
    "heads": ((X[:, :, :3], X[:, :, :2], X[:, :, :2]), {}, "divides query's 3, got 2"),
    "lengths": ((X, X, X[:, :9]), {}, "expected shape"),
    "size": ((X, X[..., :3], X), {}, "key: expected shape"),
    "empty": ((X[:, :0],) * 3, {}, "at least one token"),
    "integers": ((X.astype(int),) * 3, {}, "floating-point dtype"),
    "decay": ((X,) * 3, {"log_decay": X[:, :, :2, 0]}, "log_decay: expected shape"),
    "state": ((X,) * 3, {"initial_state": X[0]}, "initial_state: expected shape"),
    "ids": ((X,) * 3, {"segment_ids": X[:, :, 0, 0]}, "segment_ids: expected an int"),
    "ids' shape": ((X,) * 3, {"segment_ids": SEGMENTS[0]}, "segment_ids: expected sh"),
    "name": ((X,) * 3, {"implementation": "fla"}, "implementation: expected None or"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_named(case):
    args, options, message = BAD[case]
    with pytest.raises(ValueError, match=message):
        attnx.linear_attention(*args, **options)


JITTED = jax.jit(attention("xla", 0.2))
