"""How a batch's loss is made of its micro-batches' losses, read off the operator DAG."""
