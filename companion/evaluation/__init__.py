"""Scores with their uncertainty: answers and files in, numbers out; nothing here trains or needs a GPU.

Units: every `accuracy`, relative score and end of an `interval` is in percent, as in the paper's tables; BLEU and CIDEr
keep the units of the COCO caption scorer (BLEU 0 to 1, CIDEr 0 to 10). An `interval` is a 95 % interval `[low, high]`.
An answer that could not be read is never guessed: it counts as wrong (or leaves the mean) and is counted by itself.
"""
