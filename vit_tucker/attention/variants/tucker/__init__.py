"""Tucker Attention."""
