"""Models as files for other runtimes: ONNX, torch.export; each checked against the model it came from before it gets its name."""
