"""One module per checkpoint format; the writers of foreign formats are in `companion.checkpoints.writers`."""
