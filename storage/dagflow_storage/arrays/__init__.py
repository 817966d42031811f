"""Tensors as zarr arrays, compressed with blosc2 and checked when they are read."""
