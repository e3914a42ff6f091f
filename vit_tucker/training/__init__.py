"""The training engine: knows nothing of attention methods, data sets or configs' files; gets its objects passed in."""
