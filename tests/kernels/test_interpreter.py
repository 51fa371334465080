"""The product that interpreted kernels use in tests has the property that tests of kernels rely on."""

from contextlib import nullcontext

import numpy as np
import pytest
from helpers.interpreter import matmul

from llava_cot_kernels import backend


@pytest.mark.parametrize("M, K, N", [(16, 16, 16), (64, 128, 64), (64, 32, 128), (32, 37, 32)])
@pytest.mark.parametrize("layouts", ["CC", "CF", "FC", "FF"])
def test_a_row_of_a_product_does_not_depend_on_the_others(M, K, N, layouts):
    rng = np.random.default_rng(M + K)
    a, b = (rng.standard_normal(size, dtype=np.float32) for size in ((M, K), (K, N)))
    b = np.asarray(b, order=layouts[1])
    product = matmul(np.asarray(a, order=layouts[0]), b)
    exact = a.astype(np.float64) @ b.astype(np.float64)
    np.testing.assert_allclose(product, exact, atol=4e-7 * K**0.5 * 4, rtol=0)
    for _ in range(20):
        places = rng.permutation(M)
        assert (matmul(np.asarray(a[places], order=layouts[0]), b) == product[places]).all()
        a_others = np.where(np.arange(M)[:, None] == places[0], a, rng.standard_normal((M, K), dtype=np.float32))
        assert (matmul(a_others, b)[places[0]] == product[places[0]]).all()


@pytest.mark.parametrize(
    ("triton_version", "numpy_version", "works"),
    [("3.6.0", "2.4.6", True), ("3.6.0", "2.5.2", False), ("3.7.0", "2.5.2", True), ("3.10.1", "3.0.0", True)],
)
def test_an_interpreter_that_cannot_run_is_no_back_end(monkeypatch, triton_version, numpy_version, works):
    triton = pytest.importorskip("triton")
    monkeypatch.setattr(triton, "__version__", triton_version)
    monkeypatch.setattr(np, "__version__", numpy_version)
    monkeypatch.setattr(triton.knobs.runtime, "interpret", True)
    message = "needs Triton >= 3.7 or numpy < 2.5, got Triton 3.6 and numpy 2.5"
    with nullcontext() if works else pytest.warns(UserWarning, match=message):
        assert backend._triton_interprets.__wrapped__() is works
