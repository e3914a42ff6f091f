"""Run folders, weights and their digests on disk."""
