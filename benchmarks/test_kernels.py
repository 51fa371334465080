"""Every kernel beside its peers: ``pytest benchmarks/test_kernels.py --benchmark-columns=median,iqr,rounds``."""


def test_kernel(benchmark, case, provider):
    benchmark(case.providers[provider])
