"""Generation: sequences on the stages of a decoder, whose tokens take dask's comms, not its graph."""
