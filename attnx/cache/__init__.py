"""What generation keeps of the past."""

from attnx.cache.kv_cache import KVCache as KVCache
