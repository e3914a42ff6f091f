"""Data sets, transforms (timm.data) and loaders whose images and augmentations do not depend on the number of processes."""
