"""The kernels that products may run on, a module for each; `any4_jax.product.plan` lists them and chooses."""
