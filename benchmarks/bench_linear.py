"""Time the products of a decode step beside PyTorch's: ``python benchmarks/bench_linear.py``.

On a CPU a call multiplies M rows with many weights of one shape, one after the other, which together fit in no cache.
So it takes at least as long as reading them, which the share of the copy bandwidth shows. The shapes are those of the
random Mllama of bench_search.py and, with ``--report``, of a layer of the 11B model. On a GPU, whose caches are emptied
before each call, the weights are int8, rows are bfloat16, and the shapes are those of the 11B model.

The peer of int8 widens the weight, with PyTorch, and multiplies. On a GPU cuBLAS's product with a weight in bfloat16 is
there too.
"""

from collections.abc import Callable, Iterator

import torch
from timing import Case, main

from llava_cot_kernels.linear import few_row_linear

FIRST = {"gate, up": (1792, 640)}
LARGE = {"q, o of the 11B model": (4096, 4096), "gate of it": (14336, 4096), "down of it": (4096, 14336)}
REPORT = {"q, o": (640, 640), **FIRST, "down": (640, 1792), "head": (32000, 640), **LARGE}
CUDA = {**LARGE, "k, v of it": (1024, 4096)}
WEIGHT_BYTES = 160 << 20  # of all weights of a call on a CPU
DTYPES = (torch.float32, torch.bfloat16, torch.int8)


def cases(device: str, report: bool) -> Iterator[Case]:
    for dtype in DTYPES if device == "cpu" else (torch.int8,):
        shapes = CUDA if device == "cuda" else REPORT if report else FIRST
        for name, shape in shapes.items():
            for rows in (1, 4, 12, 16, 32) if report else (1, 4):
                yield product_case(name, *shape, rows, dtype, device)


def product_case(name: str, outputs: int, inputs: int, rows: int, dtype: torch.dtype, device: str) -> Case:
    count = max(2, WEIGHT_BYTES // (outputs * inputs * dtype.itemsize)) if device == "cpu" else 1
    of_x = (torch.bfloat16 if device == "cuda" else torch.float32) if dtype == torch.int8 else dtype
    x, scale = torch.randn(rows, inputs, device=device).to(of_x), None
    if dtype == torch.int8:
        weights = [torch.randint(-127, 128, (outputs, inputs), dtype=dtype, device=device) for _ in range(count)]
        scale = torch.rand(outputs, device=device) / 128
    else:
        weights = [torch.randn(outputs, inputs).to(dtype) for _ in range(count)]

    def repeated(product: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], None]:
        def call() -> None:
            with torch.inference_mode():
                for weight in weights:
                    product(weight)

        return call

    def plain(weight: torch.Tensor) -> torch.Tensor:
        product = torch.nn.functional.linear(x, weight.to(x.dtype))
        return product if scale is None else product * scale.to(x.dtype)

    def ours(weight: torch.Tensor) -> torch.Tensor:
        return few_row_linear(x, weight, scale)

    def check() -> None:
        torch.testing.assert_close(ours(weights[0]), plain(weights[0]), rtol=2e-2, atol=2e-2 * inputs**0.5)

    providers = {"native" if device == "cpu" else "triton": repeated(ours), "torch": repeated(plain)}
    if device == "cuda":
        wide = weights[0].to(of_x)
        providers["bfloat16 by cuBLAS"] = repeated(lambda _: torch.nn.functional.linear(x, wide))
    title = f"{name}, {count} weights [{outputs}, {inputs}] of {str(dtype).removeprefix('torch.')}, {rows} rows"
    read = count * outputs * inputs * dtype.itemsize
    return Case("few_row_linear", title, providers, read, check)


if __name__ == "__main__":
    main(cases, __doc__)
