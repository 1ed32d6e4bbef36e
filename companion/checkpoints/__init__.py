"""Convert checkpoints, apply deltas, inspect them."""
