"""Adapters of other codes, read into fused-steer's own form."""
