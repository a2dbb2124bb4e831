"""`python -m bench.paper`: the experiments of arXiv 2603.00425, with its rivals. docs/paper.md explains them."""
