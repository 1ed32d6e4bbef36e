"""The two sentinels of a token sequence, shared by data (which writes them) and models (which read them)."""

IGNORE_INDEX = -100  # a label that is not supervised
IMAGE_TOKEN_ID = -200  # one id per visual token; never a vocabulary id, so no tokenizer has to be resized
IMAGE_MARKER = "<image>"  # where a record's text says that the image stands
