"""What a step of generation costs after many tokens and after few."""

from __future__ import annotations

import functools
import pathlib
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

from models.lm import LM, LMConfig
from models.sampling import go_on

CONTEXTS = tuple(2**n for n in range(10, 18))
DEFAULT = ("transformer", "tnl", "based", "hybrid")


def measure(
    config: LMConfig,
    contexts: Sequence[int],
    batch_size: int,
    *,
    tokens: int = 64,
    repeats: int = 5,
) -> Iterator[tuple[int, float]]:
    """Times generation by an untrained decoder: no time depends on the parameters.

    The caches claim to hold the context, and are empty: what a step does depends on
    how many tokens came before, not on which.

    Args:
      config: the decoder.
      contexts: tokens before those that are generated.
      batch_size: sequences generated at once.
      tokens: generated and timed together.
      repeats: times of which the median counts, after one that compiles.

    Yields:
      Each context, and milliseconds for one token of every sequence.
    """
    model = LM(config, rngs=nnx.Rngs(0))
    logits = jnp.zeros((batch_size, config.vocab_size))

    @functools.partial(jax.jit, donate_argnames="cache")
    def run(model, logits, cache):
        return go_on(model, logits, cache, tokens, jax.random.key(0))

    for context in contexts:
        cache = model.init_cache(batch_size, context + tokens)
        seconds = []
        for _ in range(repeats + 1):
            lengths = jnp.full(batch_size, context, jnp.int32)
            cache = tuple(layer._replace(lengths=lengths + 0) for layer in cache)
            jax.block_until_ready(cache)
            start = time.perf_counter()
            _, cache = jax.block_until_ready(run(model, logits, cache))
            seconds.append(time.perf_counter() - start)
        yield context, 1e3 * statistics.median(seconds[1:]) / tokens


def plot(results: Sequence[dict[str, Any]], path: pathlib.Path) -> pathlib.Path:
    """Draws time against context, a line a result; says where."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    for result in results:
        contexts = [int(context) for context in result["milliseconds"]]
        times = list(result["milliseconds"].values())
        label = f"{result['experiment']}, {result['device']}"
        axes.plot(contexts, times, "o-", label=label)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x / 1024:g}K"))
    axes.set(xlabel="tokens before", ylabel="milliseconds a step")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    return path
