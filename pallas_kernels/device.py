"""Which GPU a program is for; apart from the kernels, whose imports take a second."""

import jax


def gpu_name() -> str | None:
    """The NVIDIA GPU that programs are lowered for: the abstract mesh's device, or this process's. None without one."""
    named = jax.sharding.get_abstract_mesh().abstract_device
    if named is not None:
        return named.device_kind if named.device_kind.startswith("NVIDIA") else None
    if jax.default_backend() != "gpu":
        return None
    kind = jax.devices()[0].device_kind
    return kind if kind.startswith("NVIDIA") else None
