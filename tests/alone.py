"""Methods of any scope up to a site, applied to one matrix, so that one table of laws holds for all of them."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from any4_jax.methods import SiteWeights, quantize
from any4_jax.methods.apply import apply_site
from any4_jax.methods.base import AnyMethod, scope_of
from any4_jax.statistics import Gathered
from any4_jax.weights import ScaleInput


def alone(w: np.ndarray, method: AnyMethod, gathered: Gathered | None, path: str = "the weight") -> Any:
    """The operator for w [N, K]; of a method of a site, that of a site with no other matrix, whose scale is kept."""
    if scope_of(method) == "matrix":
        return quantize(jnp.asarray(w), method, gathered, path=path)  # type: ignore[arg-type]
    made = apply_site(SiteWeights({"a": jnp.asarray(w)}), method, gathered, path)  # type: ignore[arg-type]
    operator = made.results["a"].operator
    return operator if made.input_scale is None else ScaleInput(operator, made.input_scale)
