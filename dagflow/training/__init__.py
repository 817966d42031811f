"""Training: from a model, data and a swarm to weights, whatever the swarm does meanwhile."""
