"""How many threads the CPU handlers take: those of XLA's own pool, unless fewer are asked for."""

from cuda_ffi import registration


def limit_threads(count: int) -> None:
    """Lets every handler of this process work on at most `count` threads from now on; 0 takes the limit away.

    Results don't depend on it.

    Raises:
      ValueError: count is negative.
      RuntimeError: the library can't be used.
    """
    if count < 0:
        raise ValueError(f"got count={count}, need the number of threads, or 0 for all; pass at least 0")
    registration.register("cpu").any4_cpu_limit_threads(count)
