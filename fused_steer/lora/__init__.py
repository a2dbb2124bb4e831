"""Steering beside a LoRA: finding its modules, tracing what they write, and keeping steering orthogonal to it."""
