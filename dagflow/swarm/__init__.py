"""Everything about machines: who is there, what they are, whether they answer, and how to reach them."""
