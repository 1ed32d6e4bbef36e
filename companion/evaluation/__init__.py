"""Evaluation: scores with confidence intervals from answers and files; no training, no GPU.

Units: every `accuracy`, relative score and end of an `interval` is in percent, as in the paper's tables; BLEU and CIDEr
keep the units of the COCO caption scorer (BLEU 0 to 1, CIDEr 0 to 10). An `interval` is a 95 % interval `[low, high]`.
An answer without a valid choice is never guessed: it counts as wrong (or is left out of a mean) and is counted.
"""
