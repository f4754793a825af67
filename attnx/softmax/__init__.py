"""Exact softmax attention over any mask."""

from attnx.softmax.api import block_sparse_attention as block_sparse_attention
from attnx.softmax.api import dot_product_attention as dot_product_attention
from attnx.softmax.api import neighborhood_attention as neighborhood_attention
from attnx.softmax.block_mask import BlockMask as BlockMask
from attnx.softmax.decode import decode_attention as decode_attention
from attnx.softmax.merge import merge_attention as merge_attention
from attnx.softmax.pallas import KernelConfig as KernelConfig
