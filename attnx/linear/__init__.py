"""The linear engine: recurrences `S_t = a_t S_{t-1} + k_t^T v_t`, by chunks."""

from attnx.linear.api import linear_attention as linear_attention
from attnx.linear.api import unsupported as unsupported
