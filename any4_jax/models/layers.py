"""Creates the layers that decoders are made of, all with one dtype and one source of random weights."""

import dataclasses
import functools

import jax
from flax import nnx
from jax.typing import DTypeLike


class _Stream(nnx.RngStream):
    """Draws the keys of another stream, which it advances.

    A stream of flax counts by `count[...] += 1`. While a model is traced, this asks a tracer for its sharding, and jax
    walks through all that was traced before to say why there is none: the time is quadratic in the number of layers.
    """

    def __init__(self, other: nnx.RngStream) -> None:
        self.tag, self.key, self.count = other.tag, other.key, other.count

    def __call__(self) -> jax.Array:
        """The next key; the values are those that flax draws."""
        count = self.count[...]
        # It raises if the model is created inside another transformation than the stream.
        self.count.set_value(count + 1)
        return jax.random.fold_in(self.key[...], count)


def _drawn_from(rngs: nnx.Rngs) -> nnx.Rngs:
    """Other streams that draw the same keys, see `_Stream`."""
    drawn = nnx.Rngs()
    for name, stream in rngs.items():
        setattr(drawn, name, _Stream(stream))
    return drawn


@dataclasses.dataclass(frozen=True)
class Layers:
    """See the module.

    Attributes:
        dtype: of activations.
        param_dtype: of weights; `of` takes None for `dtype`.
        rngs: the source of the random weights.
    """

    dtype: DTypeLike
    param_dtype: DTypeLike
    rngs: nnx.Rngs

    @classmethod
    def of(cls, dtype: DTypeLike, param_dtype: DTypeLike | None, rngs: nnx.Rngs) -> "Layers":
        return cls(dtype, dtype if param_dtype is None else param_dtype, rngs)

    @functools.cached_property
    def _drawn(self) -> nnx.Rngs:
        return _drawn_from(self.rngs)

    def linear(self, inputs: int, outputs: int, *, bias: bool = False) -> nnx.Linear:
        """A linear with a kernel [inputs, outputs]."""
        return nnx.Linear(
            inputs, outputs, use_bias=bias, dtype=self.dtype, param_dtype=self.param_dtype, rngs=self._drawn
        )

    def linears(self, count: int, inputs: int, outputs: int) -> nnx.Linear:
        """`count` linears as one, whose kernel is a stack [count, inputs, outputs]; see `models.experts`."""
        linear = self.linear(inputs, outputs)
        initial = nnx.initializers.lecun_normal(batch_axis=0)
        linear.kernel = nnx.Param(initial(self._drawn.params(), (count, inputs, outputs), self.param_dtype))
        return linear

    def embed(self, count: int, size: int) -> nnx.Embed:
        """An embedding [count, size]."""
        return nnx.Embed(count, size, dtype=self.dtype, param_dtype=self.param_dtype, rngs=self._drawn)

    def layer_norm(self, size: int, *, eps: float, affine: bool = True) -> nnx.LayerNorm:
        """A LayerNorm over `size` channels, with scale and bias if it is `affine`."""
        return nnx.LayerNorm(
            size,
            epsilon=eps,
            use_scale=affine,
            use_bias=affine,
            # The fast variance, E[x^2] - E[x]^2, cancels where the mean is large.
            use_fast_variance=False,
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            rngs=self._drawn,
        )


def heads(x: jax.Array, size: int) -> jax.Array:
    """Splits channels into heads: [B, T, H * size] -> [B, T, H, size]."""
    return x.reshape(*x.shape[:2], -1, size)
