"""Which implementation serves a call: the whole policy, and how to ask about it.

An engine hands over its implementations by name and one function,
`unsupported(name, *operands) -> str | None`, that says why a name cannot serve the
call. Dispatch, `explain`, the tests' skips and the README's table all read that one.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
from collections.abc import Callable, Generator, Mapping

import jax

from attnx._checks import expect

IMPLEMENTATIONS = ("reference", "xla", "pallas")


@dataclasses.dataclass(frozen=True)
class Decision:
    """What one call came to: the implementation that runs, and why not the others."""

    mechanism: str
    runs: str
    why_not: Mapping[str, str]

    def __str__(self) -> str:
        lines = [f"{self.mechanism}: {self.runs}"]
        lines += [f"  not {name}: {reason}" for name, reason in self.why_not.items()]
        return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The decisions of every attnx call made while tracing a function, in order."""

    decisions: tuple[Decision, ...]

    def __str__(self) -> str:
        return "\n".join(map(str, self.decisions)) or "no attnx call was traced"


_record: contextvars.ContextVar[list[Decision] | None] = contextvars.ContextVar(
    "attnx_decisions", default=None
)


def explain(fn: Callable, *args, **kwargs) -> Explanation:
    """Says which implementation would run for each attnx call in `fn(*args, **kwargs)`.

    Traces `fn` without running it, so arrays may be `jax.ShapeDtypeStruct`. `fn` may be
    an attnx function, a layer, or a whole model. A function under `jax.jit` that was
    already traced for these shapes is not traced again: pass the undecorated one.

    Args:
      fn: any function that calls attnx.
      *args: its positional arguments.
      **kwargs: its keyword arguments.

    Returns:
      An `Explanation`; print it, or read its `decisions`.

    Example:
      >>> import jax, jax.numpy as jnp, attnx
      >>> x = jax.ShapeDtypeStruct((1, 128, 4, 64), jnp.float32)
      >>> why = attnx.explain(attnx.dot_product_attention, x, x, x, is_causal=True)
      >>> why.decisions[0].mechanism
      'dot_product_attention'
    """
    leaves, treedef = jax.tree.flatten((args, kwargs))
    abstract = [isinstance(x, (jax.Array, jax.ShapeDtypeStruct)) for x in leaves]
    arrays = [x for x, is_array in zip(leaves, abstract, strict=True) if is_array]

    def call(arrays):
        it = iter(arrays)
        full = [
            next(it) if is_array else x
            for x, is_array in zip(leaves, abstract, strict=True)
        ]
        args, kwargs = jax.tree.unflatten(treedef, full)
        return fn(*args, **kwargs)

    with _recording() as decisions:
        jax.eval_shape(call, arrays)
    return Explanation(tuple(decisions))


def dispatch(
    mechanism: str,
    implementation: str | None,
    candidates: Mapping[str, Callable],
    unsupported: Callable[..., str | None],
    *operands,
):
    """Calls the implementation asked for, or the fastest that supports the call.

    Args:
      mechanism: the public function's name, for messages.
      implementation: a name, or None to choose where the program is lowered.
      candidates: each implementation's function of `operands`, by name.
      unsupported: `(name, *operands) -> reason | None`.
      *operands: pytrees of arrays.

    Raises:
      ValueError: an unknown name.
      NotImplementedError: a known name that cannot serve this call, with the reason.
    """
    expect(
        implementation is None or implementation in IMPLEMENTATIONS,
        "implementation",
        f"None or one of {', '.join(map(repr, IMPLEMENTATIONS))}",
        repr(implementation),
    )
    operands = varying_alike(operands)
    reasons = {
        name: unsupported(name, *operands)
        if name in candidates
        else "not implemented in this version"
        for name in IMPLEMENTATIONS
    }
    if implementation is not None:
        if reason := reasons[implementation]:
            raise NotImplementedError(
                f"{mechanism}(implementation={implementation!r}): {reason}"
            )
        asked = {name: "not asked for" for name in reasons if name != implementation}
        _note(Decision(mechanism, implementation, asked))
        return candidates[implementation](*operands)

    able = [name for name in ("pallas", "xla", "reference") if reasons[name] is None]
    slower = {name: f"{able[0]} is faster" for name in able[1:]}
    why_not = slower | {name: why for name, why in reasons.items() if why}
    if able[0] == "pallas":
        why_not["xla"] = "chosen where the program is not lowered for CUDA"
        _note(Decision(mechanism, "pallas on CUDA, xla elsewhere", why_not))
        return jax.lax.platform_dependent(
            *operands, cuda=candidates["pallas"], default=candidates["xla"]
        )
    _note(Decision(mechanism, able[0], why_not))
    return candidates[able[0]](*operands)


@contextlib.contextmanager
def _recording() -> Generator[list[Decision]]:
    decisions: list[Decision] = []
    token = _record.set(decisions)
    try:
        yield decisions
    finally:
        _record.reset(token)


def varying_alike(operands):
    """Operands that vary over the same axes of a `jax.shard_map`, as loops want."""
    leaves, treedef = jax.tree.flatten(operands)
    varying = [jax.typeof(x).manual_axis_type.varying for x in leaves]
    everywhere = frozenset().union(*varying)
    missing = [tuple(everywhere - axes) for axes in varying]
    leaves = [
        jax.lax.pcast(x, axes, to="varying") if axes else x
        for x, axes in zip(leaves, missing, strict=True)
    ]
    return jax.tree.unflatten(treedef, leaves)


def _note(decision: Decision) -> None:
    decisions = _record.get()
    if decisions is not None:
        decisions.append(decision)
