"""Time the products of a decode step on a CPU beside PyTorch's: ``python benchmarks/bench_linear.py``.

A call multiplies M rows with many weights of one shape, one after the other, which together fit in no cache. So it
takes at least as long as reading them, which the share of the copy bandwidth shows. The shapes are those of the random
Mllama of bench_search.py and, with ``--report``, of a layer of the 11B model. The peer of int8 widens the weight in
chunks and multiplies with PyTorch.
"""

from collections.abc import Callable, Iterator

import torch
from timing import Case, main

from llava_cot_kernels.linear import few_row_linear

FIRST = {"gate, up": (1792, 640)}
REPORT = {"q, o": (640, 640), **FIRST, "down": (640, 1792), "head": (32000, 640)}
REPORT |= {"q, o of the 11B model": (4096, 4096), "gate of the 11B model": (14336, 4096), "down of it": (4096, 14336)}
WEIGHT_BYTES = 160 << 20  # of all weights of a call
DTYPES = (torch.float32, torch.bfloat16, torch.int8)


def cases(device: str, report: bool) -> Iterator[Case]:
    if device != "cpu":
        raise SystemExit("bench_linear.py measures a kernel for CPUs: --device must be cpu")
    for dtype in DTYPES:
        for name, shape in (REPORT if report else FIRST).items():
            for rows in (1, 4, 12, 16, 32) if report else (1, 4):
                yield product_case(name, *shape, rows, dtype)


def product_case(name: str, outputs: int, inputs: int, rows: int, dtype: torch.dtype) -> Case:
    count = max(2, WEIGHT_BYTES // (outputs * inputs * dtype.itemsize))
    scale = None
    if dtype == torch.int8:
        weights = [torch.randint(-127, 128, (outputs, inputs), dtype=dtype) for _ in range(count)]
        scale = torch.rand(outputs) / 128
    else:
        weights = [torch.randn(outputs, inputs).to(dtype) for _ in range(count)]
    x = torch.randn(rows, inputs).to(torch.float32 if dtype == torch.int8 else dtype)

    def repeated(product: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[], None]:
        def call() -> None:
            with torch.inference_mode():
                for weight in weights:
                    product(weight)

        return call

    def plain(weight: torch.Tensor) -> torch.Tensor:
        product = torch.nn.functional.linear(x, weight.to(x.dtype))
        return product if scale is None else product * scale

    def ours(weight: torch.Tensor) -> torch.Tensor:
        return few_row_linear(x, weight, scale)

    def check() -> None:
        torch.testing.assert_close(ours(weights[0]), plain(weights[0]), rtol=2e-2, atol=2e-2 * inputs**0.5)

    title = f"{name}, {count} weights [{outputs}, {inputs}] of {str(dtype).removeprefix('torch.')}, {rows} rows"
    read = count * outputs * inputs * dtype.itemsize
    return Case("few_row_linear", title, {"native": repeated(ours), "torch": repeated(plain)}, read, check)


if __name__ == "__main__":
    main(cases, __doc__)
