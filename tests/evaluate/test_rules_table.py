"""``compat`` and ``strict`` on hand-made answers, where the two differ, and what all rule sets do with odd input."""

import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from helpers.rule_cases import CASES, QUESTIONS
from hypothesis import given
from hypothesis import strategies as st

from llava_cot.evaluate.question import Question
from llava_cot.evaluate.rules import LONGEST, RULES, judge
from llava_cot.evaluate.rules.compat import REFUSALS

DOCS = (Path(__file__).parents[2] / "docs" / "evaluation.md").read_text(encoding="utf-8")
ANYTHING = st.text(alphabet="ABCDabcd018.,:;()[]{}*'\"\\$ \n-/=%yesno€²½anwerithdogcat", max_size=60)


def shown(question, answer, rules):
    """The verdict as the table has it."""
    verdict = judge(question, answer, rules)
    if verdict.score is None:
        assert verdict.correct is None
        return "?"
    if verdict.extracted in (None, "Z") and verdict.rule in ("refusal", "letter Z"):
        assert verdict.score == 0.0
        return "refusal"
    if question.kind == "open" and not question.choices:
        return "right" if verdict.correct else "wrong"
    right = question.letter if question.choices else question.answer
    assert verdict.correct == (verdict.extracted == right)
    return verdict.extracted


@pytest.mark.parametrize("rules", ["compat", "strict"])
def test_each_case(rules):
    got = {case: shown(QUESTIONS[case.question], case.answer, rules) for case in CASES}
    assert [
        (case.question, case.answer, verdict) for case, verdict in got.items() if verdict != getattr(case, rules)
    ] == []


def test_the_table_has_what_it_must():
    assert len({(case.question, case.answer) for case in CASES}) == len(CASES) >= 200
    counts = Counter(case.question for case in CASES)
    assert set(counts) == set(QUESTIONS), "every question is used"


def test_each_difference_is_documented():
    section = DOCS.partition("### Where compat and strict differ")[2].partition("\n#")[0]
    documented = set(re.findall(r"^\| `([a-z A-Z]+)` \|", section, re.MULTILINE))
    differing = {case.difference for case in CASES if case.compat != case.strict}
    assert [case for case in CASES if (case.compat != case.strict) != bool(case.difference)] == []
    assert differing == documented


def test_a_judge_is_needed_for_what_is_graded():
    for rules in ("compat", "strict", "math"):
        assert judge(QUESTIONS["essay"], "since and so", rules).rule == "needs a judge"


@pytest.mark.parametrize("rules", ["compat", "strict"])
@given(answer=ANYTHING)
def test_any_text_has_a_verdict(rules, answer):
    for question in QUESTIONS.values():
        verdict = judge(question, answer, rules)
        assert verdict.score in (None, 0.0, 1.0)
        assert (verdict.score is None) == (verdict.correct is None)
        assert verdict.rule


def test_unknown_rules_and_long_answers():
    with pytest.raises(ValueError, match=r"rules must be one of \['compat', 'strict', 'math'\], got 'lax'"):
        judge(QUESTIONS["count"], "B", "lax")
    assert judge(QUESTIONS["count"], "B" + " " * LONGEST, "compat").score is None
    assert judge(QUESTIONS["count"], "B" + " " * (LONGEST - 1), "compat").correct


@pytest.mark.parametrize("rules", ["compat", "strict"])
@pytest.mark.parametrize(
    "piece",
    [
        "answer is ",
        "answer ",
        "(",
        "**",
        "A ",
        "a a",
        "8 ",
        "8",
        "1,",
        "1/",
        "-",
        " ",
        "\n",
        "no ",
        "yes no ",
        "cat ",
        "= ",
        "\\boxed{",
        "[",
        "[1,",
        "{",
        ".",
        "\u0300\u0327",
    ],
)
def test_no_answer_takes_long(rules, piece):
    """A rule that takes quadratic time needs minutes for so many characters."""
    answer = (piece * 20_000)[:20_000]
    began = time.process_time()
    for name in ("count", "yes", "14", "years", "shape"):
        judge(QUESTIONS[name], answer, rules)
    assert time.process_time() - began < 30


@pytest.mark.parametrize("answer", ["1." + "1" * 5_000, "1." + "1" * 20_000 + "a1", "-" + "9" * 20_000])
def test_more_digits_than_python_reads(answer):
    began = time.process_time()
    for name in ("14", "years"):
        assert judge(QUESTIONS[name], answer, "strict").score is None
    assert time.process_time() - began < 5


def test_letters_of_choices_without_some():
    """A file may have options B and D only."""
    question = Question("q", "choice", "Which?", "D", choices={"B": "red", "D": "blue"})
    for rules in ("compat", "strict"):
        assert judge(question, "D", rules).correct
        assert judge(question, "A", rules).score is None


def test_a_refusal_is_no_secret():
    for refusal in REFUSALS:
        assert shown(QUESTIONS["count"], refusal, "compat") == shown(QUESTIONS["count"], refusal, "strict") == "refusal"


def test_rules_and_judge_need_no_torch():
    code = (
        "import sys, llava_cot.evaluate.rules, llava_cot.evaluate.judge, llava_cot.evaluate.export\n"
        "print(*{'torch', 'transformers', 'sympy', 'openai', 'pandas'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


def test_each_rule_set_has_a_name():
    assert list(RULES) == ["compat", "strict", "math"]
