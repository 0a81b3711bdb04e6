"""A Llama of Tunix in 4 bits, with its own code. Run: python examples/peers/tunix_llama.py (needs google-tunix)"""

import jax.numpy as jnp
import numpy as np
from flax import nnx
from tunix.models.llama3 import model as llama

import any4_jax as a4

config = llama.ModelConfig(
    num_layers=2, vocab_size=256, embed_dim=64, hidden_dim=128, num_heads=4, head_dim=16, num_kv_heads=2,
    rope_theta=10_000, norm_eps=1e-5,
)  # fmt: skip
model = llama.Llama3(config, rngs=nnx.Rngs(0))
tokens = jnp.asarray(np.random.default_rng(0).integers(256, size=(4, 32)))
positions, mask = (
    jnp.broadcast_to(jnp.arange(32), (4, 32)),
    jnp.broadcast_to(jnp.tril(jnp.ones((32, 32), bool)), (4, 32, 32)),
)
batch = (tokens, positions, None, mask)

method = a4.methods.Any4(group_size=32)
small = a4.quantize_model(model, method, data=[batch], rules=[(r"lm_head\.w", method)], strict=True)
print(a4.surgery.coverage(small))
(before, _), (after, _) = (nnx.jit(lambda model, batch: model(*batch))(each, batch) for each in (model, small))
print(f"logits differ by {float(jnp.linalg.norm(after - before) / jnp.linalg.norm(before)):.1%} (random weights)")
a4.save("tunix_llama", small)
again = a4.load("tunix_llama", into=nnx.eval_shape(lambda: llama.Llama3(config, rngs=nnx.Rngs(0))))
print("loaded:", bool((nnx.jit(lambda model, batch: model(*batch))(again, batch)[0] == after).all()))
