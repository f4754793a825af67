"""Attention for JAX: exact references, XLA, GPU kernels, and Flax layers."""

from attnx import cache as cache
from attnx import masks as masks
from attnx import neighborhood as neighborhood
from attnx import parallel as parallel
from attnx import select as select
from attnx._dispatch import explain as explain
from attnx.cache import KVCache as KVCache
from attnx.linear import decay as decay
from attnx.linear import feature_maps as feature_maps
from attnx.linear import linear_attention as linear_attention
from attnx.linear import linear_attention_step as linear_attention_step
from attnx.linear import taylor_attention as taylor_attention
from attnx.select import dhsa_attention as dhsa_attention
from attnx.select import hylra_attention as hylra_attention
from attnx.select import moba_attention as moba_attention
from attnx.select import routing_attention as routing_attention
from attnx.select import superlinear_attention as superlinear_attention
from attnx.select import vmoba_attention as vmoba_attention
from attnx.softmax import BlockMask as BlockMask
from attnx.softmax import KernelConfig as KernelConfig
from attnx.softmax import block_sparse_attention as block_sparse_attention
from attnx.softmax import decode_attention as decode_attention
from attnx.softmax import dot_product_attention as dot_product_attention
from attnx.softmax import merge_attention as merge_attention
from attnx.softmax import neighborhood_attention as neighborhood_attention
