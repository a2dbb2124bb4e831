"""Steering beside a LoRA: which modules carry one, what it writes into the stream, and staying orthogonal to it."""
