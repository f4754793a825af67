"""Attention to what the content chooses: score blocks, choose, attend, merge."""

from attnx.select.blocks import Blocks as Blocks
from attnx.select.blocks import block_scores as block_scores
from attnx.select.blocks import bound_scores as bound_scores
from attnx.select.blocks import pool_bounds as pool_bounds
from attnx.select.blocks import pool_mean as pool_mean
from attnx.select.blocks import pool_sqrt as pool_sqrt
from attnx.select.choice import Choice as Choice
from attnx.select.choice import min_max as min_max
from attnx.select.choice import row_softmax as row_softmax
from attnx.select.choice import threshold_blocks as threshold_blocks
from attnx.select.choice import top_k_blocks as top_k_blocks
from attnx.select.chosen import Chosen as Chosen
from attnx.select.chunks import boundary_ratio as boundary_ratio
from attnx.select.chunks import chunk_starts as chunk_starts
from attnx.select.dhsa import dhsa_attention as dhsa_attention
from attnx.select.dhsa import dhsa_mask as dhsa_mask
from attnx.select.moba import moba_attention as moba_attention
from attnx.select.moba import moba_mask as moba_mask
from attnx.select.routed import routed_attention as routed_attention
from attnx.select.superlinear import Spans as Spans
from attnx.select.superlinear import superlinear_attention as superlinear_attention
from attnx.select.superlinear import superlinear_spans as superlinear_spans
from attnx.select.vmoba import vmoba_attention as vmoba_attention
from attnx.select.vmoba import vmoba_block_sizes as vmoba_block_sizes
