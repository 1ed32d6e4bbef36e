"""Weights on disk: base models in, self-describing checkpoint directories in and out."""
