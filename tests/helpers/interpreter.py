"""Triton's interpreter, with a product of matrices whose rows do not depend on each other, as on a GPU."""

import numpy as np


def matmul(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The product [M, N] of ``a`` [M, K] and ``b`` [K, N]: the bits of a row depend on that row and on ``b`` alone.

    ``np.matmul`` sums a row in an order that depends on the CPU, on the number of rows and on the row's place. einsum
    goes through all rows of contiguous matrices in one way.
    """
    return np.einsum("mk,kn->mn", np.ascontiguousarray(a), np.ascontiguousarray(b))


def make_dot_row_independent() -> None:
    """Have ``tl.dot`` use ``matmul`` above in every interpreted kernel of this process."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
        return TensorHandle(matmul(a.data, b.data).astype(d.data.dtype) + d.data, d.dtype.scalar)

    InterpreterBuilder.create_dot = create_dot


def patch_the_language_once_a_launch() -> None:
    """Have a launch prepare ``triton.language`` once for its device functions, not again for each call of one.

    The interpreter replaces the builtins of the language's modules before it runs a function that sees these modules.
    That takes longer than most device functions do. The replacements last until the launch ends.
    """
    from triton.runtime import interpreter
    from triton.runtime.interpreter import GridExecutor, InterpretedFunction, InterpreterError

    launch, patched = GridExecutor.__call__, set()

    def launch_unpatched(self, *args, **kwargs):
        patched.clear()
        launch(self, *args, **kwargs)

    def call(self, *args, **kwargs):
        if id(self.fn.__globals__) not in patched:
            interpreter._patch_lang(self.fn)
            patched.add(id(self.fn.__globals__))
        try:
            return self.rewrite()(*args, **kwargs)
        except Exception as error:
            raise InterpreterError(repr(error)) from error

    GridExecutor.__call__, InterpretedFunction.__call__ = launch_unpatched, call
