"""The operator DAG: what a model computes, apart from where and when."""
