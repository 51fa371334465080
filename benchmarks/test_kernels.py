"""Time every kernel beside its peers: ``pytest benchmarks/test_kernels.py --benchmark-columns=median,iqr,rounds``."""


def test_kernel(benchmark, case, provider):
    call, undo = case.providers[provider], case.undo
    benchmark.pedantic(call, teardown=undo, rounds=20, warmup_rounds=2)
