"""The implementations of the command's verbs."""
