"""Run the short cases of every kernel benchmark under pytest-benchmark: ``pytest benchmarks/``."""

import importlib

import pytest

KERNELS = ("paged_kv", "attention", "linear", "sampling", "logprob")


def pytest_generate_tests(metafunc):
    if "provider" in metafunc.fixturenames:
        cases = [case for stem in KERNELS for case in importlib.import_module(f"bench_{stem}").cases("cpu", False)]
        pairs = [(case, name) for case in cases for name in case.providers]
        metafunc.parametrize(("case", "provider"), pairs, ids=[f"{c.op}-{c.name}-{name}" for c, name in pairs])


@pytest.fixture(autouse=True)
def grouped(case, request):
    case.check()
    request.getfixturevalue("benchmark").group = f"{case.op}, {case.name}"
