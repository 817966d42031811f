"""A small GPT on the text that every machine has: its Python's own sources."""
