"""Moves dequantized weights off the grid on which they were stored, without changing what the model computes."""

import numpy as np
from flax import nnx

from any4_jax.models.base import Decoder
from any4_jax.models.fold import fold, inputs_of, is_foldable, module_at, repeated


def degrid(model: Decoder, *, scale_range: float = 1.2, seed: int = 0) -> Decoder:
    """Scales each channel by a random factor, which is folded into two neighbouring layers so that it cancels.

    Why: weights that were dequantized from a 4-bit file already lie on a 4-bit grid. A 4-bit method can reproduce them
    without error, so a comparison of methods on them would prove nothing.

    The factors are log-uniform in [1 / scale_range, scale_range], one for each output channel of the layer before a
    site. In every block, the sites that follow a norm come first: the norm's scale is divided by the factors, and the
    site's linears are multiplied. Then come the sites that follow a linear: its rows (and bias) are multiplied, and
    the site's linears are divided. Recorded figures depend on this order.

    Args:
        model: a float model; stays as it is.
        scale_range: the largest factor, > 1.
        seed: of the factors; one seed gives the same factors on every machine.

    Returns:
        A new model that computes the same function: up to rounding in float32; 16-bit weights are rounded once more.

    Raises:
        ValueError: scale_range is not above 1, or the model is quantized.
    """
    if not scale_range > 1:
        raise ValueError(f"got scale_range={scale_range}, and a number above 1 is needed; pass one, such as 1.2")
    rng = np.random.default_rng(seed)
    limit = np.log(scale_range)
    new = nnx.clone(model)
    for index, block in enumerate(new.blocks):
        sites = [site for site in new.sites(index) if is_foldable(block, site)]
        after_linear = [isinstance(module_at(block, site.after or ""), nnx.Linear) for site in sites]
        scaled = block
        for follows_linear, site in sorted(zip(after_linear, sites, strict=True), key=lambda pair: pair[0]):
            drawn = rng.uniform(-limit, limit, inputs_of(block, site) // site.repeat)
            factor = repeated(site, np.exp(drawn).astype(np.float32))
            scaled, _ = fold(scaled, site, factor, inverse=not follows_linear)
        nnx.update(block, nnx.state(scaled))
    return new
