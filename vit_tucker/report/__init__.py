"""Tables from the files of runs; reads results.json only, never imports models or training."""
