"""Finding attention in timm models, replacing it, and putting it back."""
