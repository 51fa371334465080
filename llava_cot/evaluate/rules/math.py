"""Open questions by math-verify, which reads LaTeX and compares expressions; all others by ``strict``."""

import threading

from llava_cot.evaluate.question import Question, Verdict
from llava_cot.evaluate.rules.strict import strict


def math(question: Question, answer: str) -> Verdict:
    r"""Return math-verify's verdict on an open question, such as one with ``\boxed{\frac{3}{4}}`` as its answer.

    If the right answer is no mathematical expression, and for questions of other kinds, the verdict is that of
    ``strict``. math-verify gives up after 5 s, by a signal; then the rules can't tell.

    Raises:
        ValueError: math-verify is not installed.
        RuntimeError: this is not the main thread, where alone a signal can stop math-verify.
    """
    if question.kind != "open" or question.choices:
        return strict(question, answer)
    try:
        from math_verify import parse, verify
        from math_verify.errors import TimeoutException
    except ImportError:
        raise ValueError('rules "math" need math-verify: pip install "llava-cot[evaluate]"') from None
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError('rules "math" must run in the main thread, since a signal stops what takes too long')
    try:
        right = parse(question.answer, raise_on_error=True)
        if not right:
            return strict(question, answer)
        found = parse(answer, raise_on_error=True)
        if not found:
            return Verdict(None, None, "no expression")
        rounding = 6 if question.precision is None else question.precision
        is_right = verify(right, found, float_rounding=rounding, raise_on_error=True)
    except TimeoutException:
        return Verdict(None, None, "math-verify took too long")
    except Exception as error:  # it raises whatever its parsers and sympy raise
        return Verdict(None, None, f"math-verify failed: {type(error).__name__}")
    return Verdict(float(is_right), str(found[-1]), "math-verify")
