"""Implements Tucker Attention: its config, layer, ranks and conversion."""
