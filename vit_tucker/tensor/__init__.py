"""Pure functions on tensors: no nn.Module, no timm, safe in float64."""
