"""The six tasks of arXiv 2603.00425: rows, prompts, and readers that find the answer in a model's text."""
