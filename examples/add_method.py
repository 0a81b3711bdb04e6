"""Add a method: NF4 whose groups are scaled to less than their largest weight, by as much as the outputs like best.

Run: python examples/add_method.py

On the command line: PYTHONPATH=examples any4 quantize MODEL OUT --import add_method --method narrow-nf4
"""

import dataclasses
from typing import ClassVar

import jax.numpy as jnp

import any4_jax as a4
from any4_jax.methods import CATALOGUE, NF4, Result
from any4_jax.statistics import Moments


@dataclasses.dataclass(frozen=True)
class NarrowNF4:
    """NF4 with the scales of a matrix multiplied by the factor that loses least.

    Attributes:
      group_size: G; larger than K means the whole row.
      tries: how many factors to try, from 1 down to 0.8.
    """

    name: ClassVar[str] = "narrow-nf4"
    sequential: ClassVar[bool] = False  # statistics of the float model will do
    needs: ClassVar = (Moments(),)  # what is gathered of the inputs x [tokens, K]
    group_size: int = 32
    tries: int = 8

    def check(self, gathered: bool) -> None:
        if not gathered:
            raise ValueError("got no statistics, narrow-nf4 weights errors by them; pass data")

    def apply(self, w, gathered) -> Result:  # w [N, K]
        widest = NF4(group_size=self.group_size).apply(w, None).operator

        def narrowed(factor):
            scales = (widest.scales * factor).astype(widest.scales.dtype)
            return a4.weights.encode(w, widest.lut, scales, None, bits=4, group_size=widest.group_size)

        factors = jnp.linspace(1, 0.8, self.tries)
        importance = gathered[Moments()].second_moment  # E[x^2], [K]
        losses = [(jnp.square(a4.dequantize(narrowed(f)) - w) * importance).sum() for f in factors]
        best = factors[jnp.argmin(jnp.stack(losses))]
        return Result(narrowed(best), {"factor": best})  # notes go to the manifest: any4 inspect shows them


CATALOGUE[NarrowNF4.name] = NarrowNF4  # from now on checkpoints and the command line know it

if __name__ == "__main__":
    model, text = a4.models.load("tiny"), a4.data.stories()
    for method in (NF4(group_size=32), NarrowNF4(group_size=32)):
        small = a4.quantize_model(model, method, data=a4.data.prompt())
        result = a4.evaluation.divergence(model, small, text, seqlen=256, windows=2)
        print(f"{method.name:10}  KL {result.kl:.5f} +- {result.bootstrap():.5f} nats per token")
    a4.save("narrow", small)
    print(a4.load("narrow").recipe)
