"""What notebooks touch: the pipeline that runs them, the figures they draw, the book they become."""
