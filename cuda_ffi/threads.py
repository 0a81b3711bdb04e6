"""A limit on the threads that the CPU handlers use, which otherwise are all of XLA's own pool."""

from cuda_ffi import registration


def limit_threads(count: int) -> None:
    """Limits every handler of this process to `count` threads from now on; 0 removes the limit.

    Results don't depend on the number of threads.

    Raises:
      ValueError: count is negative.
      RuntimeError: the library can't be used.
    """
    if count < 0:
        raise ValueError(f"got count={count}, need a number of threads, or 0 for no limit; pass at least 0")
    registration.register("cpu").any4_cpu_limit_threads(count)
