"""Defines the version of the package, which setuptools reads."""

__version__ = "0.1.0"
