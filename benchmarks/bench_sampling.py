"""sample, reference beside native: ``python benchmarks/bench_sampling.py [--report]``."""

import argparse

import torch
from timing import Quantiles, environment, measure, table

from llava_cot_kernels.backend import available
from llava_cot_kernels.sampling import sample

# (rows R, candidates N, vocabulary V): the tiny model; Llama 3's vocabulary alone, in a batch, and forked from one row.
SHAPES = [(16, 16, 1000), (1, 1, 128256), (16, 16, 128256), (1, 16, 128256)]
FILTERS = {
    "greedy": {"temperature": 0.0},
    "temperature 0.7": {"temperature": 0.7},
    "top_k 50": {"top_k": 50},
    "top_p 0.95": {"top_p": 0.95},
}


def compare(shape, filter_name, providers, repeats, device) -> tuple[str, list[Quantiles]]:
    """Check that all providers draw the same tokens with the same scores, then time each."""
    R, N, V = shape
    logits = torch.randn(R, V, device=device) * 3
    row = torch.arange(N, device=device) % R
    seed = torch.arange(N, device=device)

    def call(backend: str):
        return sample(logits, row=row, seed=seed, position=7, backend=backend, **FILTERS[filter_name])

    expected = call(providers[0])
    for provider in providers[1:]:
        actual = call(provider)
        assert torch.equal(actual.token, expected.token), f"{provider} draws other tokens"
        torch.testing.assert_close(actual.logprob, expected.logprob, rtol=0, atol=1e-4)
        torch.testing.assert_close(actual.sampling_logprob, expected.sampling_logprob, rtol=0, atol=1e-4)
        torch.testing.assert_close(actual.entropy, expected.entropy, rtol=0, atol=1e-4)
    name = f"R={R} N={N} V={V} {filter_name}"
    return name, [measure(lambda provider=provider: call(provider), repeats) for provider in providers]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--report", action="store_true", help="all shapes; without it the first")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    providers = available("sample", args.device)[::-1]
    shapes = SHAPES if args.report else SHAPES[:1]
    rows = [compare(shape, name, providers, args.repeats, args.device) for shape in shapes for name in FILTERS]
    print(f"{environment()}\n\n{table('sample', providers, rows)}")


if __name__ == "__main__":
    main()
