"""Data on disk, in its official formats, and the way from there to token sequences (no PyTorch in the readers)."""
