"""The kernels that products may run on, one module each; `any4_jax.matmul` holds their table and chooses."""
