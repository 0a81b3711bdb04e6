"""Methods as plain JSON and back: what a manifest holds of them."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from any4_jax.methods.any4 import Any4
from any4_jax.methods.awq import AWQ
from any4_jax.methods.bcq import BCQ
from any4_jax.methods.fpq import FPQ
from any4_jax.methods.gptq import GPTQ
from any4_jax.methods.lifts import unlifted
from any4_jax.methods.rtn import AF4, FP4, MX4, NF4, Int
from any4_jax.methods.smoothquant import SmoothQuant
from any4_jax.methods.spqr import SpQR
from any4_jax.methods.tune import Tune
from any4_jax.methods.zeroquant import ZeroQuant

_SHIPPED = (Int, NF4, FP4, AF4, MX4, Any4, BCQ, GPTQ, AWQ, SmoothQuant, FPQ, SpQR, Tune, ZeroQuant)
CATALOGUE: dict[str, type] = {cls.name: cls for cls in _SHIPPED}
"""Methods by name. Add your own under its `name`, and manifests and the command line will know it."""


def method_to_json(method: Any) -> dict[str, Any] | None:
    """{"method": name, "fields": {...}}, nested where a field holds a method. None, which leaves a linear alone, stays
    None; a lifted method is the one that it lifts.

    Raises:
      ValueError: the method is not in the catalogue.
    """
    if method is None:
        return None
    own: Any = unlifted(method)
    listed: Any = CATALOGUE.get(own.name)
    if listed is not type(own):
        raise ValueError(
            f"got the method {type(own).__name__}, which a manifest is read without unless methods.CATALOGUE has it "
            f"under {own.name!r}; add it there"
        )
    fields = {field.name: getattr(own, field.name) for field in dataclasses.fields(own)}
    return {
        "method": own.name,
        "fields": {name: method_to_json(v) if dataclasses.is_dataclass(v) else v for name, v in fields.items()},
    }


def method_from_json(spec: Any) -> Any:
    """The inverse of `method_to_json`.

    Raises:
      ValueError: this version doesn't have the method, or a field of it.
    """
    if spec is None:
        return None
    cls = CATALOGUE.get(spec["method"])
    if cls is None:
        known = ", ".join(CATALOGUE)
        raise ValueError(
            f"got a method {spec['method']!r}, this version knows {known}; upgrade any4_jax, or import the module that "
            "adds it to methods.CATALOGUE"
        )
    unknown = sorted(set(spec["fields"]) - {field.name for field in dataclasses.fields(cls)})
    if unknown:
        raise ValueError(f"method {spec['method']!r} has no field {unknown[0]!r} in this version; upgrade any4_jax")
    return cls(**{name: _field(value) for name, value in spec["fields"].items()})


def _field(value: Any) -> Any:
    if isinstance(value, Mapping):
        return method_from_json(value)
    return tuple(value) if isinstance(value, list) else value
