"""Which axis of which argument is the batch, the heads, the tokens: one table.

Axes have letters: b for the batch, n for heads of queries or keys, t and s for tokens
of queries and of keys, a dot for others; `*` stands for further axes of space. A
shorter array has the last of them, or what a tuple says for its number of axes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, cast

import attnx.cache as cache
import attnx.linear as linear
import attnx.select as select
import attnx.softmax as softmax
from attnx.parallel import decode, halo, ring, states, ulysses
from attnx.softmax import masks

Letters = str | tuple[str, ...]

ARGUMENTS: Mapping[str, Letters] = {
    "router": "btn.",
    "query": "btn.",
    "key": "bsn.",
    "value": "bsn.",
    "bias": "bnts",
    "mask": "bnts",
    "scale": "",
    "lengths": "b",
    "query_start": "b",
    "query_seq_lengths": "b",
    "key_value_seq_lengths": "b",
    "segment_ids": "bt",
    "log_decay": ("", "n", "", "btn", "btn."),
    "starts": "bt",
    "centroids": "n..",
    "initial_state": "bn..",
    "state": "bn..",
    "extra_key": "b.n.",
    "extra_value": "b.n.",
    "outputs": "btn.",
    "lses": "btn",
}

# Of the arrays inside arguments: by class and field.
FIELDS: Mapping[type, Mapping[str, str]] = {
    masks.Window: {"left": "n", "right": "n"},
    masks.Prefix: {"length": "b"},
    masks.Lengths: {"query": "b", "key": "b"},
    masks.Segments: {"query_ids": "bt", "key_value_ids": "bs"},
    masks.Dense: {"array": "bnts"},
    masks.Offset: {"query": "b", "key": "b"},
    softmax.BlockMask: {"indices": "bn..", "counts": "bn.", "partial_counts": "bn."},
    cache.KVCache: {"key": "bsn.", "value": "bsn.", "lengths": "b"},
    cache.SparseCache: {
        "key": "bns.",
        "value": "bns.",
        "positions": "bns",
        "lengths": "b",
    },
    select.Choice: {"rows": "b..", "blocks": "b.."},
}


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a function may be cut.

    Attributes:
      returns: letters of what it returns, in its structure.
      residual: letters of what it returns as well where it is asked to.
      cuts: the axes that may be cut; also as a function of the arguments.
      arguments: letters that differ from `ARGUMENTS`.
      leading: the argument whose first array says how all are cut.
      with_axis: whether it takes the `axis_name` that the tokens are cut over.
    """

    returns: Any = "btn."
    residual: str = "btn"
    cuts: str | Callable[[Mapping[str, Any]], str] = "bn"
    arguments: Mapping[str, Letters] = dataclasses.field(default_factory=dict)
    leading: str = "query"
    with_axis: bool = False

    def letters(self, argument: str) -> Letters:
        return self.arguments.get(argument, ARGUMENTS.get(argument, ""))


_PLAIN = Layout()
_LINEAR = Layout("btn.", "bn..")
_IN_SPACE = Layout(
    "bt*n.",
    "bt*n",
    arguments={"query": "bt*n.", "key": "bs*n.", "value": "bs*n."},
)
_STEP = Layout(
    ("bn.", "bn.."),
    arguments={
        "query": "bn.",
        "key": "bn.",
        "value": "bn.",
        "log_decay": ("", "n", "bn", "bn."),
    },
)


def _in_pieces(layout: Layout, **changes: Any) -> Layout:
    return dataclasses.replace(layout, **{"cuts": "btsn", **changes}, with_axis=True)


LAYOUTS: Mapping[Callable, Layout] = {
    softmax.dot_product_attention: _PLAIN,
    softmax.block_sparse_attention: _PLAIN,
    softmax.neighborhood_attention: _IN_SPACE,
    softmax.decode_attention: _PLAIN,
    softmax.merge_attention: Layout(("btn.", "btn"), cuts="btn", leading="outputs"),
    linear.linear_attention: _LINEAR,
    linear.linear_attention_step: _STEP,
    select.moba_attention: _PLAIN,
    # Over a layer, pairs of all heads compete.
    select.vmoba_attention: dataclasses.replace(
        _IN_SPACE,
        cuts=lambda arguments: "b" if arguments.get("scope") == "layer" else "bn",
    ),
    select.dhsa_attention: _PLAIN,
    # Its choice is an average over heads.
    select.hylra_attention: Layout(("btn.", "b"), cuts="b"),
    select.routing_attention: _PLAIN,
    select.superlinear_attention: _PLAIN,
    cache.sparse_decode_attention: _PLAIN,
    cache.dist_attention: _PLAIN,
    ring.ring_attention: _in_pieces(_PLAIN),
    ulysses.ulysses_attention: _in_pieces(_PLAIN),
    states.linear_attention: _in_pieces(_LINEAR),
    halo.neighborhood_attention: _in_pieces(_IN_SPACE),
    # The cache is cut, the newest tokens are not.
    decode.decode_attention: _in_pieces(_PLAIN, cuts="bsn", leading="key"),
    decode.dist_attention: _in_pieces(_PLAIN, cuts="bsn", leading="cache"),
    decode.append: _in_pieces(
        Layout(cast(Any, cache.KVCache)("bsn.", "bsn.", "b"), leading="cache"),
        cuts="bsn",
        arguments={"key": "b.n.", "value": "b.n."},
    ),
}
