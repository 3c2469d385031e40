"""The public ops. One file per op: checks, fake kernels, autograd, autocast and vmap."""
