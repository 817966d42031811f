"""Running plans on dask: graphs, clusters, workers, the driver."""
