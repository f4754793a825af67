"""The GPU kernel of linear attention: lowered for CUDA, and interpreted."""

import functools
import itertools
import re

import chex
import jax
import jax.numpy as jnp
import pytest
from helpers import SINCE_0_11, SLOW, assert_matches, normal, relative_rms

import attnx
from attnx.linear import pallas, pallas_scan
from pallas_kernels import mosaic
from pallas_kernels.chunks import CHUNK
from pallas_kernels.linear_attention import Counted, Decay

SIZES = list(itertools.product((64, 128, 256), repeat=2))
LONG = jnp.repeat(jnp.arange(3), jnp.array([300, 20, 448]))[None]
# heads, key heads, length, key size, value size, decay, options
CASES = {
    "no decay": (1, 1, 256, 128, 128, None, {}),
    "per head, ragged": (2, 1, 200, 64, 64, "head", {}),
    "per token": (1, 1, 256, 64, 128, "token", {}),
    "per channel, ragged": (2, 1, 200, 64, 64, "channel", {}),
    "per channel": (1, 1, 128, 128, 128, "channel", {}),
    "per channel, forgetting": (1, 1, 128, 64, 128, "strong channel", {}),
    "documents": (
        1,
        1,
        128,
        128,
        64,
        "token",
        {"segment_ids": jnp.repeat(jnp.arange(4), 32)[None]},
    ),
    "reverse": (1, 1, 150, 64, 64, "token", {"reverse": True}),
    "wide": (1, 1, 128, 256, 256, "head", {}),
    "forgetting": (2, 1, 700, 64, 64, "strong", {}),
    "forgetting, reverse": (1, 1, 768, 64, 64, "strong", {"reverse": True}),
    "long documents": (
        *(1, 1, 768, 64, 64, "head"),
        {"segment_ids": LONG},
    ),
    "normalized": (2, 1, 200, 64, 64, "head", {"normalize": True}),
    "normalized, by token": (1, 1, 256, 128, 64, "token", {"normalize": True}),
    "normalized, forgetting": (1, 1, 128, 64, 64, "strong", {"normalize": True}),
}
# In pieces, which may leave out what they forget.
IN_PIECES = ["per head, ragged", "per token", "normalized"]
IN_PIECES += [name for name in CASES if name.startswith(("forgetting", "long"))]
SHORT = [name for name in CASES if CASES[name][2] <= 256]
INTERPRETED = SHORT if SINCE_0_11 else ["per head, ragged", "normalized"]


def arrays(name, dtype="bfloat16"):
    """Query, key, value, initial state and, if there is one, log decay."""
    heads, key_heads, length, size, value_size, decay, options = CASES[name]
    normalize = options.get("normalize", False)
    tokens = normal(
        0,
        (1, length, heads, size),
        (1, length, key_heads, size),
        (1, length, key_heads, value_size),
        dtype=dtype,
    )
    each = 1, length, heads
    by = {"head": (heads,), "token": each, "channel": (*each, size), "strong": each}
    by["strong channel"] = by["channel"]
    by = by.get(decay)
    shape = 1, heads, size, value_size + normalize
    state, *decays = normal(1, shape, *[by] if by else [])
    if normalize:  # As features are.
        query, key, value = tokens
        tokens = jnp.exp(query / 4), jnp.exp(key / 4), value
        state = jnp.abs(state)
    if decay == "strong channel":  # Many channels forget at once, some all at once.
        decays = [
            (-jnp.exp(3 * x)).astype(dtype).at[:, 40].set(-jnp.inf) for x in decays
        ]
        return *tokens, state, *decays
    slower = 1 if decay == "strong" else 20
    return *tokens, state, *(-jnp.abs(x) / slower for x in decays)


def attention(implementation, **options):
    def fn(query, key, value, state, log_decay=None):
        return attnx.linear_attention(
            query,
            key,
            value,
            log_decay=log_decay,
            initial_state=state,
            implementation=implementation,
            return_state=True,
            **options,
        )

    return fn


def calls(fn, *args):
    """How often the kernel is called in a program for CUDA."""
    text = jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
    return len(re.findall(r"custom_call @mosaic_gpu", text))


@pytest.mark.parametrize("name", INTERPRETED)
def test_matches_the_reference(name):
    options = CASES[name][-1]
    with mosaic.interpret():
        assert_matches(
            attention("pallas", **options),
            attention("reference", **options),
            arrays(name),
        )


@pytest.mark.parametrize("name", ["per head, ragged", "per token", "per channel"])
def test_lowers_where_numbers_have_64_bits(name):
    with jax.enable_x64(True):
        assert calls(attention("pallas"), *arrays(name)) > 0


@SLOW
@pytest.mark.parametrize("name", IN_PIECES)
def test_a_sequence_in_pieces_is_the_whole(name, monkeypatch):
    monkeypatch.setattr(pallas, "number_of_pieces", lambda *_: 3)
    monkeypatch.setattr(pallas_scan, "_LEAST_CHUNKS", 1)  # Each in as many parts.
    options = CASES[name][-1]
    with mosaic.interpret():
        assert_matches(
            attention("pallas", **options),
            attention("reference", **options),
            arrays(name),
        )


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize(
    ("per_token", "left_out"), [(0.0, 0), (-0.1, 1), (-0.15, 2), (-1.0, 3)]
)
def test_states_leave_out_what_they_forget(
    per_token, left_out, transposed, parts, monkeypatch
):
    """Of a piece of four chunks, tokens 32 bits of decay away and more."""
    size, chunks = 64, 4
    monkeypatch.setattr(pallas_scan, "_LEAST_CHUNKS", chunks // parts)
    length = 2 * chunks * CHUNK
    key, value = normal(0, *[(1, length, 1, size)] * 2, dtype="bfloat16")
    since = jnp.cumsum(jnp.full((1, 1, 1, CHUNK), per_token), -1)
    ages = jnp.arange(chunks * CHUNK)
    if transposed:  # What leaves the last piece to the left.
        piece, far = slice(chunks * CHUNK, None), slice(length - left_out * CHUNK, None)
        weights = jnp.exp2(per_token * (ages + 1))
    else:
        piece, far = slice(0, chunks * CHUNK), slice(0, left_out * CHUNK)
        weights = jnp.exp2(per_token * ages[::-1])
    expected = jnp.einsum(
        "t,th,tv->hv",
        *(weights, key[0, piece, 0], value[0, piece, 0]),
        precision="highest",
    )
    with mosaic.interpret():
        added, until = pallas_scan.added_states(
            *(2, (key.at[:, far].set(jnp.nan), value), Decay(since, jnp.ones(1))),
            slice(1, 2) if transposed else slice(1),
            counted=Counted(None, None),
            transposed=transposed,
        )
    assert added.shape[2] == until.shape[3] == parts
    state = pallas_scan.summed("bns,bnshv->bnhv", until[:, :, 0], added)[0, 0]
    assert relative_rms(state[:, :-1], expected) < 4e-3
    expected = weights @ key[0, piece, 0].astype(jnp.float32)
    assert relative_rms(state[:, -1], expected) < 1e-6


@pytest.mark.parametrize("state", [False, True])
def test_states_that_are_not_wanted_are_not_written(state):
    """Without them, a sequence of one piece moves nothing but tokens."""
    tokens = [jnp.repeat(x, 2, 0) for x in arrays("per head, ragged")[:3]]

    def gradients(*tokens):
        fn = functools.partial(attnx.linear_attention, implementation="pallas")
        out, pull = jax.vjp(functools.partial(fn, return_state=state), *tokens)
        return pull(out)

    shapes = [
        x.aval.shape
        for equation in jax.make_jaxpr(gradients)(*tokens).eqns
        for x in equation.outvars
    ]
    assert ((2, 2, 64, 64) in shapes) == state


def test_decays_by_channel_go_to_the_kernels_as_they_are():
    """They are as large as keys, and in float32 twice that."""
    query, key, value, _, log_decay = arrays("per channel")

    def gradients(*arrays):
        fn = lambda *x: attention("pallas")(*x[:3], None, x[3])[0]
        out, pull = jax.vjp(fn, *arrays)
        return pull(out)

    alike = [
        equation.primitive.name
        for equation in jax.make_jaxpr(gradients)(query, key, value, log_decay).eqns
        for x in equation.outvars
        if (x.aval.shape, x.aval.dtype) == (log_decay.shape, jnp.float32)
    ]
    assert alike == ["custom_vmap_call"]  # Their gradient, by the kernel.


@pytest.mark.skipif(not SINCE_0_11, reason="the detector came with jax 0.11")
@pytest.mark.parametrize("name", ["no decay", "normalized, by token"])
def test_no_memory_is_raced_for(name):
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    def gradients(*arrays):
        out, pull = jax.vjp(attention("pallas", **CASES[name][-1]), *arrays)
        return pull(out)

    with mosaic.interpret(detect_races=True):
        jax.block_until_ready(jax.jit(gradients)(*arrays(name)))
        assert not gpu_callbacks.get_races().races_found


@SLOW
def test_a_mapped_axis_joins_the_batch():
    tokens = [x[None] for x in arrays("per token")]
    with mosaic.interpret():
        assert_matches(
            jax.vmap(attention("pallas")), jax.vmap(attention("reference")), tokens
        )


@pytest.mark.parametrize(("size", "value_size"), SIZES)
def test_lowers_for_cuda(size, value_size):
    shapes = [(2, 8192, 2, size)] * 2 + [(2, 8192, 2, value_size)]
    tokens = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes]

    def gradients(*tokens):
        out, pull = jax.vjp(
            functools.partial(attnx.linear_attention, implementation="pallas"), *tokens
        )
        return pull(out)

    # Both directions sum the pieces' states first; then outputs, dq, and dk with dv.
    together = size * value_size <= 128 * 128
    assert calls(gradients, *tokens) == (5 if together else 6)


@pytest.mark.parametrize(
    ("name", "passes"),
    [("normalized", 3), ("normalized, by token", 3), ("per channel, ragged", 2)],
)
def test_gradients_take_so_many_passes(name, passes):
    def gradients(*arrays):
        out, pull = jax.vjp(attention("pallas", **CASES[name][-1]), *arrays)
        return pull(out)

    assert calls(gradients, *arrays(name)) == passes


@SLOW
def test_a_denominator_of_zero_gives_zero():
    query, key, value, *_ = arrays("normalized")
    fn = functools.partial(
        attnx.linear_attention, normalize=True, implementation="pallas"
    )
    with mosaic.interpret():
        out, pull = jax.vjp(fn, query, jnp.zeros_like(key), value)
        gradients = pull(jnp.ones_like(out))
    assert not out.any()
    chex.assert_tree_all_finite(gradients)


@pytest.mark.parametrize("name", ["no decay", "per channel, ragged"])
def test_a_short_sequence_is_one_piece(name):
    assert calls(attention("pallas"), *arrays(name)) == 1


@pytest.mark.skipif(not SINCE_0_11, reason="the detector came with jax 0.11")
def test_a_decay_by_channel_races_for_no_memory():
    from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

    tokens = [x[:, :128, :1] for x in arrays("per channel, ragged")[:3]]
    (log_decay,) = normal(2, tokens[0].shape)

    def gradients(query, key, value, log_decay):
        fn = functools.partial(attnx.linear_attention, implementation="pallas")
        of = lambda *x: fn(*x[:3], log_decay=x[3])
        out, pull = jax.vjp(of, query, key, value, log_decay)
        return pull(out)

    with mosaic.interpret(detect_races=True):
        jax.block_until_ready(jax.jit(gradients)(*tokens, -jnp.abs(log_decay)))
        assert not gpu_callbacks.get_races().races_found


@pytest.mark.parametrize(
    ("reason", "dtype", "size", "options"),
    [
        ("takes bfloat16 and float16, not float32", "float32", 64, {}),
        ("takes head sizes .*, not 48", "bfloat16", 48, {}),
        ("normalizes .* up to 16384", "bfloat16", 256, {"normalize": True}),
        (
            "per channel .* not .256, 256.",
            "bfloat16",
            256,
            {"log_decay": jnp.zeros((1, 256, 2, 256))},
        ),
        (
            "does not normalize with a decay per channel",
            "bfloat16",
            64,
            {"log_decay": jnp.zeros((1, 256, 2, 64)), "normalize": True},
        ),
    ],
)
def test_what_is_not_served_says_why(reason, dtype, size, options):
    x = jax.ShapeDtypeStruct((1, 256, 2, size), dtype)
    call = functools.partial(attnx.linear_attention, implementation="pallas", **options)
    with pytest.raises(NotImplementedError, match=reason):
        jax.eval_shape(call, x, x, x)


@pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU")
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("name", CASES)
def test_matches_the_reference_on_a_gpu(name, dtype):
    options = CASES[name][-1]
    assert_matches(
        attention("pallas", **options),
        attention("reference", **options),
        arrays(name, dtype),
    )


@pytest.mark.parametrize(
    ("shape", "pieces"),
    [
        ((8, 2048, 16), 1),  # 128 rows of heads fill the device.
        ((1, 16384, 32), 4),
        ((1, 131072, 16), 8),
        ((16, 65536, 4), 2),
        ((1, 1 << 20, 4), 32),
        ((1, 500, 1), 1),
        ((1, 100 * 128, 16), 5),  # The next number below that divides the chunks.
    ],
)
def test_pieces_fill_the_device(shape, pieces):
    query = jax.ShapeDtypeStruct((*shape, 128), jnp.bfloat16)
    assert pallas.number_of_pieces(query) == pieces
