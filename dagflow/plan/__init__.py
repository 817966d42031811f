"""Planning: pure functions from an operator DAG and a roster to stages, placement and schedule."""
