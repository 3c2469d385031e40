"""Loading of weights that other implementations trained and named."""
