"""The linear engine: recurrences `S_t = a_t S_{t-1} + k_t^T v_t`, by chunks."""

from attnx.linear import decay as decay
from attnx.linear import feature_maps as feature_maps
from attnx.linear.api import linear_attention as linear_attention
from attnx.linear.step import linear_attention_step as linear_attention_step
from attnx.linear.taylor import taylor_attention as taylor_attention
