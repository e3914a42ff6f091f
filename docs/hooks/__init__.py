"""What the documentation site adds to its Markdown files while it is built; ``mkdocs.yml`` lists ``hooks.py``."""

from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
"""The repository."""
