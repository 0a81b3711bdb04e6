"""What puts a token of each row into a KIVI cache and attends: the kernels to choose from."""

from any4_jax.choice import Backend, Choice
from any4_jax.kv_cache.kivi_cpu import CPU
from any4_jax.kv_cache.kivi_cuda import CUDA
from any4_jax.kv_cache.plain import append_then_attend

# (the cache, queries, new keys, settings) is the problem that they support or not.
BACKENDS = Choice((CUDA, CPU, Backend("xla", lambda *problem: None, append_then_attend)))
