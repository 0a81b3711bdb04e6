"""The kernels that products may run on, one module each; `any4_jax.product.plan` holds their table and chooses."""
