"""GPU kernels: a leaf package that imports jax and nothing of attnx."""
