"""One place on any file system: locations, documents, retries, and errors told apart."""
