"""The tasks of training, the state that they work on, and how it is rebuilt."""
