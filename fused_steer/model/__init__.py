"""Reach a decoder layer: find it, rewrite its forward, and insert the module that steers it."""
