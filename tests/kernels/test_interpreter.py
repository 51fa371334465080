"""The product that interpreted kernels use in tests has the property that tests of kernels rely on."""

import numpy as np
import pytest
from helpers.interpreter import matmul


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
