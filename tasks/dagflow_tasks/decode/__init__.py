"""A stage of a decoder, which answers."""
