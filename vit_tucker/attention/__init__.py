"""Attention layers, their configs and the registry. Importing this package registers the built-in methods."""

from vit_tucker.attention import variants as variants
