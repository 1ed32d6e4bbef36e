"""One module per checkpoint format; `FORMATS` in open.py lists them, `companion.checkpoints.writers` writes others'."""
