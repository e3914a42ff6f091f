"""The config of a run: schema, reading, validation."""
