"""Choosing among implementations of one function: the first that works where a program is lowered.

The product, the table solver and the refit each have a `Choice`. The last of its options runs everywhere and is the
truth that the others must match.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

import jax

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
"""What a program may be lowered for, in the words of `jax.lax.platform_dependent`."""


class Option(Protocol):
    """One implementation."""

    @property
    def name(self) -> str:
        """What `backend=` calls it."""
        ...

    @property
    def supports(self) -> Callable[..., str | None]:
        """(*problem, platform) -> None, or the reason in words why it can't. It looks at shapes, dtypes and options
        only, so it works while tracing."""
        ...


O = TypeVar("O", bound=Option)  # noqa: E741 (of Option)


@dataclasses.dataclass(frozen=True)
class Choice(Generic[O]):
    """Options in the order in which they are tried.

    Attributes:
      options: the last one supports every problem on every platform.
    """

    options: tuple[O, ...]

    def named(self, name: str) -> O:
        """The option of that name.

        Raises:
          ValueError: there is none; the sentence gives the names there are.
        """
        for option in self.options:
            if option.name == name:
                return option
        known = ", ".join(repr(option.name) for option in self.options)
        raise ValueError(f"got backend={name!r}, there are {known}; pass one of them, or None to let it be chosen")

    def required(self, name: str, *problem: Any, platform: str) -> O:
        """The option of that name, which was asked for and so has to work.

        Raises:
          ValueError: there is none of that name, or it can't, for its own reason.
        """
        option = self.named(name)
        reason = option.supports(*problem, platform)
        if reason is not None:
            raise ValueError(f"backend {name!r} can't do this: {reason}; pass another backend, or None")
        return option

    def first(self, *problem: Any, platform: str) -> O:
        """The first option that can solve a problem on a platform."""
        return next(option for option in self.options if option.supports(*problem, platform) is None)

    def lowered(self, call: Callable[[O], Callable[..., Any]], *problem: Any) -> Callable[..., Any]:
        """A function that runs, on each platform that it is lowered for, what `call` makes of that platform's option.

        Where one option is chosen for all platforms nothing else is traced.
        """
        last = self.options[-1]
        chosen = {platform: self.first(*problem, platform=platform) for platform in PLATFORMS}
        special = {platform: call(option) for platform, option in chosen.items() if option is not last}
        default = call(last)
        if not special:
            return default
        return lambda *operands: jax.lax.platform_dependent(*operands, default=default, **special)


def default_platform() -> str:
    """The platform of this process by default: jax calls a GPU of either make "gpu"."""
    name = jax.default_backend()
    if name != "gpu":
        return name
    return "rocm" if "rocm" in jax.devices()[0].client.platform_version.lower() else "cuda"


def platform_of(array: Any) -> str:
    """The platform where an array lies; for a traced one, or one of numpy, the process's default."""
    if isinstance(array, jax.core.Tracer) or not isinstance(array, jax.Array):
        return default_platform()
    name = next(iter(array.devices())).platform
    return default_platform() if name == "gpu" else name
