"""Analyses a model's attention and its costs: spectra and ranks, which models can be patched, FLOPs, latency, KV cache."""
