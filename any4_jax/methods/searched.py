"""What FPQ has found for a layer, in the place of statistics: a search that is done once serves later runs."""

import dataclasses
from typing import Any, ClassVar, NoReturn

import jax


@dataclasses.dataclass(frozen=True)
class Searched:
    """Formats, scales and shifts that an earlier search found; no activations give them.

    The accumulator is a dict. Under "weights" it has, by the path of each linear that was searched together, in its
    block ("" for a linear by itself), "bits" and "exponent" int32 [], the width and the exponent bits, and "scales"
    float32 [N]. Under "inputs", unless they stay as they are, it has "bits", "exponent", "scale" float32 [] and
    "shifts" int32 [K].
    """

    source: ClassVar[str] = "pass stats=load_search_results(FILE), or given=False"

    def empty(self, k: int) -> dict[str, Any]:
        return {"weights": {}}

    def update(self, accumulator: Any, x: jax.Array, mask: jax.Array) -> NoReturn:
        raise ValueError(
            "got data, fpq with given=True takes what an earlier search found; pass stats=load_search_results(FILE), "
            "or given=False"
        )

    def merge(self, a: Any, b: Any) -> Any:
        raise ValueError("got two search results of one layer, need one; leave one out")

    def scaled(self, accumulator: Any, factor: jax.Array) -> Any:
        return accumulator  # found for the input as it is in the end
