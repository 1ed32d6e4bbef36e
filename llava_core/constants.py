"""What rooms of one floor share: the sentinels of a token sequence, and the ways to ask for a description."""

IGNORE_INDEX = -100  # a label that is not supervised
IMAGE_TOKEN_ID = -200  # one id per visual token; never a vocabulary id, so no tokenizer has to be resized
IMAGE_MARKER = "<image>"  # where a record's text says that the image stands

# Our own wordings of "describe briefly"; as many as the paper's Table 11 has.
BRIEF_INSTRUCTIONS = (
    "What does this picture show, in one sentence?",
    "Say briefly what you see.",
    "Give this image a caption.",
    "In a few words, what is in the picture?",
    "Sum up the image in a single line.",
    "Tell me shortly what the photo is about.",
    "Write one short sentence about this picture.",
    "Name the main content of the image, nothing more.",
    "How would you caption this photo?",
    "Put what the image shows into a few words.",
    "Keep it short: what can be seen here?",
)

# Our own wordings of "describe in detail"; as many as the paper's Table 12 has.
DETAIL_INSTRUCTIONS = (
    "Describe this image in detail.",
    "Tell me everything that can be seen in the image.",
    "Give a complete description of the scene.",
    "What does this picture show? Leave nothing out.",
    "Put the whole scene into words.",
    "Take me through the picture, part by part.",
    "Write a full account of what is in the photo.",
    "How would you describe this scene to somebody who cannot see it?",
    "List and describe what the image contains.",
    "Say in detail what you see here.",
    "Paint this picture with words.",
    "What is there to see, and where? Be thorough.",
    "Please report all that the image shows.",
    "Describe the things in this photo and how they are arranged.",
    "Look closely and tell me about every part of the image.",
    "I would like a long and careful description of this image.",
)
