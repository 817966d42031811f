"""Language models in a store: brought there, checked against transformers, and read by a deployment."""
