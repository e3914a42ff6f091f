"""What a model's attention is and what it costs: spectra and ranks, which models can be patched, FLOPs, latency, KV cache."""
