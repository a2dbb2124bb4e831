"""How a decoder layer is reached: finding it, rewriting its forward, and the module that steers it."""
