"""What a model's attention weights look like: spectra and ranks of their tensors."""
