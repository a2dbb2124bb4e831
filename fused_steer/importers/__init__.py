"""Import adapters of other libraries into fused-steer's format."""
