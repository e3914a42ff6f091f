"""Models on disk that rebuild themselves: timm's hub layout, with the patch beside the architecture."""
