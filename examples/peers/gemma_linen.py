"""The transformer of Gemma, a Linen module, in 4 bits. Run: python examples/peers/gemma_linen.py (needs gemma)"""

import jax
import jax.numpy as jnp
from gemma import gm

import any4_jax as a4

config = gm.nn.config.TransformerConfig(
    num_embed=256, embed_dim=64, hidden_dim=128, num_heads=4, head_dim=16, num_kv_heads=2, final_logit_softcap=None,
    use_post_attn_norm=True, use_post_ffw_norm=True, attention_types=(gm.nn.config.AttentionType.GLOBAL,) * 2,
)  # fmt: skip
model = gm.nn.Transformer(config=config)
tokens = jax.random.randint(jax.random.key(0), (2, 16), 1, 256)
variables = jax.jit(model.init)(jax.random.key(1), tokens)

method = a4.methods.Any4(group_size=32)
module, small = a4.quantize_model((model, variables), method, data=[tokens], strict=True)
print(a4.surgery.coverage((module, small)))
before, after = (jax.jit(m.apply)(v, tokens).logits for m, v in ((model, variables), (module, small)))
print(f"logits differ by {float(jnp.linalg.norm(after - before) / jnp.linalg.norm(before)):.1%} (random weights)")
a4.save("gemma_linen", (module, small))
again, loaded = a4.load("gemma_linen", into=(model, variables))
print("loaded:", bool((jax.jit(again.apply)(loaded, tokens).logits == after).all()))
