"""What PyTorch does with the same product on the same GPU, where it is installed: cuBLAS, and its own int4 kernel.

Both are timed as replays of a captured CUDA graph, in which launching costs next to nothing. Letters: N outputs, K
inputs, M rows of x.
"""

import importlib
from collections.abc import Callable
from typing import Any

import numpy as np


class Torch:
    """PyTorch's products of bfloat16 x with rotating weights [N, K], on its GPU.

    Raises:
      RuntimeError: torch isn't installed, or sees no GPU; in one sentence.
    """

    def __init__(self) -> None:
        try:
            self._torch: Any = importlib.import_module("torch")
        except ImportError:
            raise RuntimeError("torch isn't installed, so cuBLAS and torch's int4 product are not measured") from None
        if not self._torch.cuda.is_available():
            raise RuntimeError("this torch sees no GPU, so cuBLAS and torch's int4 product are not measured")

    def cublas(self, n: int, k: int, rows: tuple[int, ...], copies: int, rounds: int) -> list[float]:
        """Seconds of x @ w.T for each number of rows: the median of `rounds` replays through all copies of w."""
        torch = self._torch
        weights = [torch.randn(n, k, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]
        product = torch.nn.functional.linear
        return self._timed(lambda x, w: product(x, w), k, rows, weights, rounds)

    def int4(self, n: int, k: int, rows: tuple[int, ...], copies: int, rounds: int, group_size: int) -> list[float]:
        """The same of `_weight_int4pack_mm`: integers of 4 bits with a scale and a zero a group."""
        torch = self._torch
        codes = torch.randint(0, 256, (n, k // 2), device="cuda", dtype=torch.uint8)
        packed = torch.ops.aten._convert_weight_to_int4pack(codes, 8)
        scales = torch.rand(k // group_size, n, 2, device="cuda").to(torch.bfloat16)
        weights = [(packed.clone(), scales.clone()) for _ in range(copies)]

        def product(x: Any, w: Any) -> Any:
            return torch.ops.aten._weight_int4pack_mm(x, w[0], group_size, w[1])

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
                turns = []
                for _ in range(rounds + 2):
                    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                    begin.record()
                    graph.replay()
                    end.record()
                    torch.cuda.synchronize()
                    turns.append(begin.elapsed_time(end) / 1e3 / len(weights))
                # The first two load what later ones find loaded.
                seconds.append(float(np.median(turns[2:])))
                del graph, x
        finally:
            weights.clear()
            torch.cuda.empty_cache()
        return seconds

    def out_of_memory(self) -> type[Exception]:
        """What torch raises where jax has left it too little of the GPU."""
        return self._torch.cuda.OutOfMemoryError
