"""Everything around the paper: data tools, GPT-4 instruction data, evaluation, ablations, the miniature, the book."""
