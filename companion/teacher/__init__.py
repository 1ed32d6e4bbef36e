"""Instruction data from captions and boxes: prompts, a chat client, a parser, and the loop that writes the records."""
