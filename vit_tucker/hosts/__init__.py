"""Describes the models whose modules are replaced: how these are found, read, called and written."""
