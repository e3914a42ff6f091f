"""Implements multi-head latent attention: its config, layer and conversion."""
