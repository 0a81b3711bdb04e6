"""Which GPU a program is for. Separate from the kernels, whose imports take a second."""

import jax

LEAST_CAPABILITY = 8.0
"""The compute capability that bfloat16 in registers needs."""


def gpu_name() -> str | None:
    """The NVIDIA GPU that programs are lowered for: the abstract mesh's device, or this process's; None without one."""
    named = jax.sharding.get_abstract_mesh().abstract_device
    if named is not None:
        return named.device_kind if named.device_kind.startswith("NVIDIA") else None
    device = _attached()
    return None if device is None else device.device_kind


def why_not() -> str | None:
    """None where there is a GPU that the kernels run on, else the reason in words."""
    if gpu_name() is None:
        return "no NVIDIA GPU is attached, and no abstract device names one"
    device = _attached()
    if device is not None and float(device.compute_capability) < LEAST_CAPABILITY:
        return f"{device.device_kind} has compute capability {device.compute_capability}; {LEAST_CAPABILITY} is needed"
    return None


def _attached() -> jax.Device | None:
    """This process's first device if it is an NVIDIA GPU; jax calls AMD's GPUs "gpu" too."""
    if jax.default_backend() != "gpu":
        return None
    device = jax.devices()[0]
    return None if "rocm" in device.client.platform_version.lower() else device
