"""Evaluation with lm-evaluation-harness: a model class for it (harness.py), and comparisons of adapters."""
