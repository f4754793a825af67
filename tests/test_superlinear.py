"""Superlinear multi-step attention."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import assert_matches, normal

import attnx
from attnx.select import superlinear_spans

B, T, N, K, H = 2, 37, 4, 2, 8
ARRAYS = normal(0, (B, T, N, H), (B, T, N, H), (B, T, K, H), (B, T, K, H))
ROUTER, QUERY, KEY, VALUE = ARRAYS
SETTING = {"num_spans": 2, "window_index": 1, "backward": 1.0, "forward": 0.5}
LENGTHS = ((9, 1, 27), (20, 17))
SEGMENTS = jnp.array([np.repeat(np.arange(len(n)), n) for n in LENGTHS])


def superlinear(implementation=None, **options):
    options = SETTING | options
    return functools.partial(
        attnx.superlinear_attention, implementation=implementation, **options
    )


run = jax.jit(superlinear())
find = jax.jit(functools.partial(superlinear_spans, **SETTING))


def definition(router, query, key, value, start=0, num_spans=2, sw_index=1, p=0.5):
    """One head in float64, token by token, as the paper's reference has it."""
    length, sizes = len(key), {"b": 1.0, "f": 0.5}
    out = np.zeros((length, value.shape[1]))
    chosen = []
    for t in range(start, length):
        window = int((sw_index + 1) ** (1 / p)) - 1
        near = set(range(max(t - window + 1, start), t + 1))
        anchors, i = [], sw_index + 1
        while (anchor := t - int(i ** (1 / p)) + 1) >= start:
            anchors.append((router[t] @ key[anchor], anchor))
            i += 1
        best = sorted(anchors, key=lambda x: -x[0])[:num_spans]
        reach = {s: int(np.ceil(f * (t + 1 - start) ** 0.5)) for s, f in sizes.items()}
        spans = [
            range(max(a - reach["b"], start), min(a + reach["f"], t - window) + 1)
            for _, a in best
        ]
        chosen.append([(s.start, s.stop - 1) for s in spans])
        scores = np.array([score for score, _ in best] or [0.0])
        gates = np.exp(scores - scores.max())
        gates /= gates.sum()
        for gate, span in zip(gates, spans or [()], strict=True):
            assert not near & set(span)
            seen = sorted(near | set(span))
            s = key[seen] @ query[t] * query.shape[1] ** -0.5
            weights = np.exp(s - s.max())
            out[t] += gate * (weights @ value[seen]) / weights.sum()
    return out, chosen


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_is_the_papers_algorithm(implementation):
    got = run(*ARRAYS) if implementation == "xla" else superlinear("reference")(*ARRAYS)
    spans = find(ROUTER, KEY)
    wide = [np.asarray(x, np.float64) for x in ARRAYS]
    for b, n in np.ndindex(B, N):
        heads = (n, n, n // 2, n // 2)
        arrays = [x[b, :, i] for x, i in zip(wide, heads, strict=True)]
        want, chosen = definition(*arrays)
        np.testing.assert_allclose(got[b, :, n], want, atol=2e-6)
        for t, runs in enumerate(chosen):
            for i in range(2):
                got_run = int(spans.first[b, n, t, i]), int(spans.last[b, n, t, i])
                if i < len(runs):
                    assert got_run == runs[i]
                else:
                    assert got_run == (0, -1)
                    assert spans.score[b, n, t, i] == -jnp.inf


def test_matches_the_reference_gradients_included():
    options = {"segment_ids": SEGMENTS, "scale": 0.5}

    def fn(implementation):
        run = superlinear(implementation, **options)
        return lambda *arrays: (run(*arrays),)

    assert_matches(fn("xla"), fn("reference"), ARRAYS)


def reached(length, **setting):
    """Which keys all spans and the window hold: bool `[length, length]`."""
    key = jnp.ones((1, length, 1, 1))
    spans = jax.jit(functools.partial(superlinear_spans, num_spans=999, **setting))
    first, last, _ = (np.asarray(x[0, 0]) for x in spans(key, key))
    edges = np.zeros((length, length + 1), int)
    for t in range(length):
        np.add.at(edges[t], first[t], 1)
        np.add.at(edges[t], last[t] + 1, -1)
    power = setting.get("search_power", 0.5)
    window = int((setting["window_index"] + 1) ** (1 / power)) - 1
    index = np.arange(length)
    near = index > index[:, None] - window
    return (np.cumsum(edges, 1)[:, :-1] > 0) | near


@pytest.mark.parametrize(
    ("setting", "length"),
    [
        ({"window_index": 3}, 2048),
        (
            {
                "window_index": 65,
                "backward": 3.0,
                "forward": 1.0,
                "search_power": 0.55,
                "span_power": 0.55,
            },
            2600,
        ),
    ],
)
def test_no_key_is_out_of_reach(setting, length):
    assert reached(length, **setting)[np.tri(length, dtype=bool)].all()


def test_too_short_spans_leave_holes():
    assert not reached(512, window_index=3, backward=1.5)[np.tri(512, dtype=bool)].all()


def test_one_span_over_everything_is_causal_attention():
    wide = {"num_spans": 1, "window_index": 2, "backward": 99.0, "forward": 99.0}
    got = jax.jit(superlinear(**wide))(*ARRAYS)
    want = attnx.dot_product_attention(QUERY, KEY, VALUE, is_causal=True)
    chex.assert_trees_all_close(got, want, atol=2e-6)


def test_the_first_tokens_see_their_window_only():
    got = jax.jit(superlinear(window_index=9))(*ARRAYS)
    want = attnx.dot_product_attention(QUERY, KEY, VALUE, is_causal=True)
    chex.assert_trees_all_close(got, want, atol=2e-6)


def test_packed_documents_are_as_alone():
    """Padding on the left is a document of its own, so it shifts nothing."""
    got = jax.jit(superlinear(segment_ids=SEGMENTS))(*ARRAYS)
    wide = [np.asarray(x, np.float64) for x in ARRAYS]
    for b, lengths in enumerate(LENGTHS):
        start = 0
        for length in lengths:
            part = slice(start, start := start + length)
            want, _ = definition(*(x[b, part, 0] for x in wide))
            np.testing.assert_allclose(got[b, part, 0], want, atol=2e-6)


def test_no_token_looks_ahead():
    before = run(*ARRAYS)
    for t in (1, 17, 30):
        later = [x.at[:, t:].multiply(-7.0) for x in ARRAYS]
        chex.assert_trees_all_close(run(*later)[:, :t], before[:, :t], atol=1e-6)


def test_the_router_learns_through_the_weights_only():
    def gradient(**options):
        fn = superlinear(**options)
        loss = lambda router: jnp.sin(fn(router, QUERY, KEY, VALUE)).sum()
        return jax.jit(jax.grad(loss))(ROUTER)

    assert (gradient(num_spans=1) == 0).all()
    gradients = gradient(num_spans=2)
    # Token 8 is the first with two anchors before a window of 3: 8 - 3 and 8 - 8.
    assert (gradients[:, :8] == 0).all()
    assert (jnp.abs(gradients[:, 8:]).max((-1, -2)) > 0).all()


def test_newest_queries_against_a_cache():
    """Also where the cache has room left: its empty slots are in the future."""
    want = run(*ARRAYS)
    starts = jnp.array([34, 20])
    newest = [
        jnp.stack([x[b, s : s + 3] for b, s in enumerate(starts.tolist())])
        for x in (ROUTER, QUERY)
    ]
    got = jax.jit(superlinear(query_start=starts))(*newest, KEY, VALUE)
    for b, start in enumerate(starts.tolist()):
        chex.assert_trees_all_close(got[b], want[b, start : start + 3], atol=2e-6)


def test_memory_grows_as_the_power_three_halves():
    def bytes_for(length):
        arrays = [jax.ShapeDtypeStruct((1, length, 1, 16), jnp.float32)] * 4
        fn = jax.jit(superlinear(num_spans=3, backward=2.0))
        return fn.lower(*arrays).compile().memory_analysis().temp_size_in_bytes

    assert bytes_for(8192) < 4 * 8192**2 / 4


def test_mistakes_are_named():
    with pytest.raises(ValueError, match="search_power: expected more than 0"):
        superlinear(search_power=0.0)(*ARRAYS)
    with pytest.raises(ValueError, match=r"router: expected shape \(2, 37, 4, 8\)"):
        superlinear()(ROUTER[:, 1:], *ARRAYS[1:])
    with pytest.raises(ValueError, match="num_spans: expected at least 1, got 0"):
        superlinear(num_spans=0)(*ARRAYS)
    with pytest.raises(ValueError, match="key: expected router's length"):
        superlinear()(ROUTER, QUERY, KEY[:, 1:], VALUE[:, 1:])
    with pytest.raises(NotImplementedError, match="spans differ from query to query"):
        superlinear("pallas")(*ARRAYS)
