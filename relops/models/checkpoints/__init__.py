"""Functions that load weights of other implementations and translate their parameter names."""
