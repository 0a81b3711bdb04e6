"""The same product on the same GPU in PyTorch, if it is installed: cuBLAS, and PyTorch's own int4 kernel.

They are timed as replays of a captured CUDA graph, in which a launch costs next to nothing. This library's CUDA product
is timed in the same way, in addition to its time in XLA's graphs. Letters: N outputs, K inputs, M rows of x.
"""

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np

# The duration of replays that are launched together, so that the GPU waits for the host only before the first.
TURN_MS = 2.0


class Torch:
    """PyTorch's products of bfloat16 x with rotating weights [N, K] on its GPU.

    Raises:
      RuntimeError: torch isn't installed, or finds no GPU; the message is one sentence.
    """

    def __init__(self) -> None:
        try:
            self._torch: Any = importlib.import_module("torch")
        except ImportError:
            raise RuntimeError("torch isn't installed, so cuBLAS and torch's int4 product are not measured") from None
        if not self._torch.cuda.is_available():
            raise RuntimeError("this torch sees no GPU, so cuBLAS and torch's int4 product are not measured")

    def cublas(self, n: int, k: int, rows: tuple[int, ...], copies: int, rounds: int) -> list[float]:
        """Seconds of x @ w.T for each number of rows: the median over `rounds` turns, each through all copies of w."""
        torch = self._torch
        weights = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
        product = torch.nn.functional.linear
        return self._timed(lambda x, w: product(x, w), k, rows, weights, rounds)

    def int4(self, n: int, k: int, rows: tuple[int, ...], copies: int, rounds: int, group_size: int) -> list[float]:
        """The same for `_weight_int4pack_mm`: 4-bit integers with a scale and a zero point per group."""
        torch = self._torch
        codes = torch.randint(0, 256, (n, k // 2), device="cuda", dtype=torch.uint8)
        packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
        scales = torch.rand(k // group_size, n, 2, device="cuda").to(torch.bfloat16)
        weights = [(packed.clone(), scales.clone()) for _ in range(copies)]

        def product(x: Any, w: Any) -> Any:
            return torch.ops.aten._weight_int4pack_mm(x, w[0], group_size, w[1])

        return self._timed(product, k, rows, weights, rounds)

    def few_bits(
        self,
        launch: Callable[..., None],
        n: int,
        k: int,
        rows: tuple[int, ...],
        copies: int,
        rounds: int,
        group_size: int,
    ) -> list[float]:
        """The same for this library's 4-bit product, with a table per row and offsets; `launch` is what
        `any4_jax.product.backends.cuda.launcher` returns."""
        torch = self._torch

        def array(*shape: int) -> Any:
            return torch.randn(*shape, device="cuda", dtype=torch.bfloat16)

        groups = -(-k // group_size)
        weights = [
            (
                torch.randint(0, 256, (n, k // 2), device="cuda", dtype=torch.uint8),
                *(array(n, 16), array(n, groups), array(n, groups)),
            )
            for _ in range(copies)
        ]
        results = {m: torch.empty(m, n, device="cuda", dtype=torch.bfloat16) for m in rows}

        def product(x: Any, w: Any) -> None:
            y, stream = results[len(x)], torch.cuda.current_stream().cuda_stream
            addresses = [array.data_ptr() for array in w]
            launch(x.data_ptr(), len(x), *addresses, y.data_ptr(), n, k, group_size, 0, stream)

        return self._timed(product, k, rows, weights, rounds)

    def _timed(
        self, product: Callable[[Any, Any], Any], k: int, rows: tuple[int, ...], weights: list[Any], rounds: int
    ) -> list[float]:
        torch = self._torch
        seconds = []
        try:
            for m in rows:
                x = torch.randn(m, k, device="cuda", dtype=torch.bfloat16)
                product(x, weights[0])
                torch.cuda.synchronize()
                graph = torch.cuda.CUDAGraph()
                with torch.cuda.graph(graph):
                    for w in weights:
                        product(x, w)
                # The first replays load what later ones find already loaded.
                milliseconds = min(self._replayed(graph, 1) for _ in range(2))
                replays = max(1, round(TURN_MS / milliseconds))
                turns = [self._replayed(graph, replays) for _ in range(rounds)]
                seconds.append(float(np.median(turns)) / 1e3 / replays / len(weights))
                del graph, x
        finally:
            weights.clear()
            torch.cuda.empty_cache()
        return seconds

    def _replayed(self, graph: Any, times: int) -> float:
        """Milliseconds of `times` replays."""
        torch = self._torch
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(times):
            graph.replay()
        end.record()
        torch.cuda.synchronize()
        return begin.elapsed_time(end)

    def out_of_memory(self) -> type[Exception]:
        """The exception that torch raises if jax has left it too little GPU memory."""
        return self._torch.cuda.OutOfMemoryError
