"""Sentinels of a token sequence, shared by data, model and trainer."""

IGNORE_INDEX = -100  # a label that is not supervised
IMAGE_TOKEN_ID = -200  # one id per visual token; never a vocabulary id, so no tokenizer has to be resized
IMAGE_MARKER = "<image>"  # position of the image in the text of a record
