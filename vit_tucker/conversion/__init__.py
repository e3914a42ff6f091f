"""Weights to factors: calibration, ranks, read-outs, refinement."""
