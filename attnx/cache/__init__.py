"""What generation keeps of the past, and what it may forget."""

from attnx.cache.dist import dist_attention as dist_attention
from attnx.cache.evict import adaptive_budgets as adaptive_budgets
from attnx.cache.evict import evict as evict
from attnx.cache.guikv import guikv_scores as guikv_scores
from attnx.cache.guikv import redundancy as redundancy
from attnx.cache.kv_cache import KVCache as KVCache
from attnx.cache.policies import key_norm_scores as key_norm_scores
from attnx.cache.policies import snapkv_scores as snapkv_scores
from attnx.cache.policies import streaming_scores as streaming_scores
from attnx.cache.sparse_cache import SparseCache as SparseCache
from attnx.cache.sparse_cache import sparse_decode_attention as sparse_decode_attention
