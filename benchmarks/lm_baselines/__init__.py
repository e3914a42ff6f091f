"""Published ways to compress the KV cache of a LLaMA-like model, as baselines at an equal number of cache entries."""
