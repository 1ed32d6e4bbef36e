"""Data sets of the paper, checked and turned into LLaVA-Instruct records."""
