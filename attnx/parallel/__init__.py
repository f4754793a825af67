"""Calls under a device mesh: what needs no communication, and sequences cut in pieces.

`sharded` runs any function of attnx where its arrays are. The others are for sequences
that are longer than one device can hold: they run inside `jax.shard_map`, each device
with its piece of the tokens, and `sharded` takes them as well.
"""

from attnx.parallel.api import sharded as sharded
from attnx.parallel.decode import append as append
from attnx.parallel.decode import decode_attention as decode_attention
from attnx.parallel.decode import dist_attention as dist_attention
from attnx.parallel.halo import neighborhood_attention as neighborhood_attention
from attnx.parallel.pieces import from_zigzag as from_zigzag
from attnx.parallel.pieces import to_zigzag as to_zigzag
from attnx.parallel.ring import ring_attention as ring_attention
from attnx.parallel.states import linear_attention as linear_attention
from attnx.parallel.ulysses import ulysses_attention as ulysses_attention
