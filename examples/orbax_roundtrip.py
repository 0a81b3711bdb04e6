"""Quantized weights in an Orbax checkpoint of your own, and in one of this library.

Run: python examples/orbax_roundtrip.py [FOLDER]

The first keeps your checkpoints as they are: the weights are a nested dict of plain arrays next to whatever else you
save, and Orbax alone restores them. The second is one folder, which is replaced as a whole or not at all, and has
checksums of every byte.
"""

import json
import sys
import tempfile
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import linen as nn

import any4_jax as a4

folder = Path(sys.argv[1] if len(sys.argv) > 1 else tempfile.mkdtemp()).resolve()

net = nn.Sequential([nn.Dense(512, name="up"), nn.gelu, nn.Dense(256, name="down")])
x = jax.random.normal(jax.random.key(0), (4, 256))
params = net.init(jax.random.key(1), x)
module, small = a4.quantize_model((net, params), a4.methods.NF4(group_size=64))
y = module.apply(small, x)

# Your own checkpoint. The spec is JSON that says which arrays form one weight, and how it was quantized.
arrays, spec = a4.to_arrays((module, small))
(folder / "spec.json").write_text(json.dumps(spec))
with ocp.PyTreeCheckpointer() as checkpointer:
    checkpointer.save(folder / "mine", {"model": arrays, "step": 1000})

with ocp.PyTreeCheckpointer() as checkpointer:
    restored = checkpointer.restore(folder / "mine")
print(f"step {restored['step']}, restored by Orbax alone:")
for path, array in jax.tree_util.tree_leaves_with_path(restored["model"]):
    print(f"  {jax.tree_util.keystr(path, simple=True, separator='/'):30} {array.dtype!s:9} {array.shape}")

spec = json.loads((folder / "spec.json").read_text())
again = a4.from_arrays(restored["model"], spec)
np.testing.assert_array_equal(module.apply(again, x), y)
print("from_arrays: the same output, to the bit")

# A checkpoint of this library, loaded into a model that has no weights yet.
a4.save(folder / "any4", (module, small))
module, again = a4.load(folder / "any4", into=(net, jax.eval_shape(net.init, jax.random.key(0), x)))
np.testing.assert_array_equal(module.apply(again, x), y)
size = {
    name: sum(a.nbytes for a in jax.tree.leaves(tree)) / 1e6 for name, tree in (("float", params), ("4 bits", again))
}
print(f"a4.load: the same output, to the bit; {size['float']:.2f} MB of floats, {size['4 bits']:.2f} MB in 4 bits")
