"""Evaluation and predictions of trained models."""
