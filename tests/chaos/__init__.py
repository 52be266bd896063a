"""The fault catalogue: what is done to ResNetLab on purpose, and what must be left of it. Run by `scripts/chaos`."""
