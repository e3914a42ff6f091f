"""Trains a model, without knowledge of attention methods, data sets or config files: it works on the objects passed in."""
