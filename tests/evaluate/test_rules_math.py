"""``math``, where math-verify is installed: expressions, rounding, its limits, and what falls back to ``strict``."""

import builtins
import threading

import pytest
from helpers.rule_cases import QUESTIONS

from llava_cot.evaluate.question import Question
from llava_cot.evaluate.rules import judge


def _open(answer, answer_type="float", precision=None):
    return Question("q", "open", "What?", answer, answer_type=answer_type, precision=precision)


@pytest.mark.parametrize(
    "right, answer, score",
    [
        ("14", "14", 1.0),
        ("14", r"\boxed{14}", 1.0),
        ("14", "The answer is 14.0", 1.0),
        ("14", "13", 0.0),
        ("0.75", r"So it is \boxed{\frac{3}{4}}.", 1.0),
        ("0.75", r"$\frac{6}{8}$", 1.0),
        ("0.75", r"$\frac{6}{9}$", 0.0),
        (r"$\frac{\sqrt{2}}{2}$", r"$\frac{1}{\sqrt{2}}$", 1.0),
        (r"$x^2 - 1$", r"$(x-1)(x+1)$", 1.0),
        (r"$x^2 - 1$", r"$(x-1)(x+2)$", 0.0),
        ("14", "", None),
        ("14", "I don't know", None),
    ],
)
def test_expressions(right, answer, score):
    pytest.importorskip("math_verify")
    verdict = judge(_open(right), answer, "math")
    assert verdict.score == score, verdict
    assert (verdict.extracted is None) == (score is None)


def test_precision():
    pytest.importorskip("math_verify")
    assert judge(_open("1.45", precision=2), "1.454", "math").correct
    assert not judge(_open("1.45", precision=2), "1.46", "math").correct
    assert not judge(_open("1.45"), "1.454", "math").correct


@pytest.mark.parametrize(
    "name, answer", [("count", "**B**"), ("yes", "**Yes**"), ("shape", "A rectangle"), ("essay", "so")]
)
def test_the_rest_is_strict(name, answer):
    pytest.importorskip("math_verify")
    assert judge(QUESTIONS[name], answer, "math") == judge(QUESTIONS[name], answer, "strict")


def test_what_takes_too_long_can_not_be_told():
    pytest.importorskip("math_verify")
    assert judge(_open("14"), "$9^{9^{9^{9}}}$", "math").score is None


def test_another_thread_is_refused():
    pytest.importorskip("math_verify")
    raised = []

    def score():
        try:
            judge(_open("14"), "14", "math")
        except RuntimeError as error:
            raised.append(str(error))

    thread = threading.Thread(target=score)
    thread.start()
    thread.join()
    assert raised and "main thread" in raised[0]


def test_a_missing_package_is_named(monkeypatch):
    real = builtins.__import__

    def refuse(name, *rest):
        if name.startswith("math_verify"):
            raise ImportError(name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    with pytest.raises(ValueError, match=r'pip install "llava-cot\[evaluate\]"'):
        judge(_open("14"), "14", "math")
