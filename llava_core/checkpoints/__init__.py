"""Weights on disk: base models in, self-describing checkpoint directories in and out.

Missing, damaged or contradictory files are a CheckpointError; its message names the file and the fix.
"""
