"""Choice among the implementations of a function: the first that works on the platform a program is lowered for.

The product, the table solver and the refit each have a `Choice`. Its last option runs everywhere, and is the reference
that the others must match.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, Generic, Protocol, TypeVar

import jax

from any4_jax.late import late

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
"""The platforms that a program may be lowered for, as `jax.lax.platform_dependent` names them."""


class Option(Protocol):
    """One implementation."""

    @property
    def name(self) -> str:
        """What `backend=` calls it."""
        ...

    @property
    def supports(self) -> Callable[..., str | None]:
        """(*problem, platform) -> None, or the reason why it can't, in words. It looks only at shapes, dtypes and
        options, so it works while tracing."""
        ...


@dataclasses.dataclass(frozen=True)
class Backend:
    """An option that is one function; a kind of problem with more to say about its options extends it.

    Attributes:
      name: what `backend=` calls it.
      supports: (*problem, platform) -> None, or the reason why it can't, in words.
      run: the function.
    """

    name: str
    supports: Callable[..., str | None]
    run: Callable[..., Any]


O = TypeVar("O", bound=Option)  # noqa: E741 (of Option)
T = TypeVar("T")


@dataclasses.dataclass(frozen=True)
class Choice(Generic[O]):
    """The implementations to choose from.

    Attributes:
      options: in the order in which they are tried; the last one supports every problem on every platform.
      late: where platforms differ, the last option is traced only when a program is lowered for one that runs it. For
        problems without derivatives, whose last option takes long to trace.
    """

    options: tuple[O, ...]
    late: bool = False

    def named(self, name: str) -> O:
        """The option of that name.

        Raises:
          ValueError: no option has that name; the message lists the names.
        """
        for option in self.options:
            if option.name == name:
                return option
        known = ", ".join(repr(option.name) for option in self.options)
        raise ValueError(f"got backend={name!r}, need one of {known}; pass one of these, or None to let it be chosen")

    def required(self, name: str, *problem: Any, platform: str) -> O:
        """The option that the caller asked for by name, which must be able to solve the problem.

        Raises:
          ValueError: no option has that name, or it can't solve the problem; the message gives the reason.
        """
        option = self.named(name)
        reason = option.supports(*problem, platform)
        if reason is not None:
            raise ValueError(f"backend {name!r} can't do this: {reason}; pass another backend, or None")
        return option

    def first(self, *problem: Any, platform: str) -> O:
        """The first option that can solve the problem on the platform.

        Raises:
          ValueError: no option can; the message gives the last one's reason.
        """
        reason = None
        for option in self.options:
            reason = option.supports(*problem, platform)
            if reason is None:
                return option
        names = ", ".join(repr(option.name) for option in self.options)
        raise ValueError(
            f"got a problem that none of the backends {names} can solve on {platform}, the last because {reason}; "
            "change the operands to what one of them supports"
        )

    def verdicts(self, *problem: Any, platform: str) -> list[tuple[O, str]]:
        """Each option with "taken", or the reason why it can't, or which other one comes first, in words.

        Raises:
          ValueError: as in `first`.
        """
        taken = self.first(*problem, platform=platform)
        could = f"could, but {taken.name!r} comes first"
        return [
            (option, option.supports(*problem, platform) or ("taken" if option is taken else could))
            for option in self.options
        ]

    def choose(self, name: str | None, *problem: Any, arrays: tuple[Any, ...]) -> str | None:
        """The name of the option that a program of `arrays` uses. While they are traced it is None, and `lowered`
        decides for each platform.

        Args:
          name: the option that the caller asked for, or None for the first that works where the arrays are. With a
            name, no other option is traced.
          arrays: the operands; Tracers, numpy arrays and None are allowed.

        Raises:
          ValueError: as in `required`, and in `first` without a name.
        """
        if name is not None:
            return self.required(name, *problem, platform=platform_of(*arrays)).name
        if any(isinstance(array, jax.core.Tracer) for array in arrays):
            return None
        return self.first(*problem, platform=platform_of(*arrays)).name

    def lowered(
        self, call: Callable[[O], Callable[..., Any]], *problem: Any, name: str | None = None
    ) -> Callable[..., Any]:
        """The function that `call` returns for the named option. Without a name: a function that, on each platform it
        is lowered for, runs what `call` returns for the first option that works there.

        If that is the last option on all platforms, no other is traced.

        Raises:
          ValueError: no option has that name; without a name, as in `first`.
        """
        if name is not None:
            return call(self.named(name))
        return lowered_by_platform(
            lambda platform: self.first(*problem, platform=platform), self.options[-1], call, is_late=self.late
        )


def lowered_by_platform(
    pick: Callable[[str], T], default: T, call: Callable[[T], Callable[..., Any]], *, is_late: bool = False
) -> Callable[..., Any]:
    """A function that runs `call(pick(platform))` on each platform it is lowered for, and `call(default)` on platforms
    outside PLATFORMS.

    Where `default` is picked on all platforms, nothing else is traced. Where another is picked on some, an `is_late`
    default is traced only when the function is lowered for one of the rest (late.py).
    """
    picked = {platform: pick(platform) for platform in PLATFORMS}
    special = {platform: call(choice) for platform, choice in picked.items() if choice != default}
    run = call(default)
    if not special:
        return run
    if is_late:
        run = late(run, next(iter(special.values())))
    return lambda *operands: jax.lax.platform_dependent(*operands, default=run, **special)


def default_platform() -> str:
    """The platform of a program whose arrays are committed to no device: that of `jax.default_device` where it is set,
    else this process's default."""
    device = jax.default_device.value
    return _platform(jax.devices(device)[0] if device is None or isinstance(device, str) else device)


def platform_of(*arrays: Any) -> str:
    """The platform that a program of these arrays runs on: that of the first array committed to a device, else the
    default. Traced arrays, numpy arrays and ShapeDtypeStructs are committed to none.

    Within jit it is the default: an array from outside is a constant there, and doesn't decide where the program runs.
    """
    for array in arrays:
        placed = isinstance(array, jax.Array) and not isinstance(array, jax.core.Tracer)
        if placed and array.committed:
            return default_platform() if _is_staged() else _platform(next(iter(array.devices())))
    return default_platform()


def _is_staged() -> bool:
    """Whether operations are put into a program now. Under vmap and grad alone, those on plain arrays run at once."""
    return isinstance(jax.lax.full((), 0), jax.core.Tracer)


def _platform(device: Any) -> str:
    """A device's name in PLATFORMS: jax calls GPUs of both makers "gpu"."""
    if device.platform != "gpu":
        return device.platform
    return "rocm" if "rocm" in device.client.platform_version.lower() else "cuda"
