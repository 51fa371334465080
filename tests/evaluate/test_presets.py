"""Prompts are what VLMEvalKit and LLaVA-CoT's authors asked, character for character."""

import pytest

from llava_cot.evaluate.benchmarks import BENCHMARKS
from llava_cot.evaluate.presets import PRESETS, prompt_of
from llava_cot.evaluate.question import Question

CHOICES = {"A": "fox", "B": "a kite", "C": "C"}
CHOICE = Question("1", "choice", "What is shown?", "A", CHOICES)
HINTED = Question("1", "choice", "What is shown?", "A", CHOICES, hint="It is night.\nLook.")
YES_NO = Question("1", "yes_no", "Is it a fox?", "Yes", hint="never asked")
MATH = Question(
    "1", "open", "How much?", "4", {"A": "1", "B": "4"}, fields={"query": "Hint: Say it.\nQuestion: How much?"}
)
UNREAD = Question("1", "choice", "Which? A is 1, B is 2", "A", CHOICES, fields={"options_in_text": True})


@pytest.mark.parametrize(
    ("preset", "name", "question", "prompt"),
    [
        ("plain", "mmstar", CHOICE, "What is shown?\nA. fox\nB. a kite\nC. C"),
        ("plain", "mmbench", HINTED, "It is night.\nLook.\nWhat is shown?\nA. fox\nB. a kite\nC. C"),
        ("plain", "mathvista", MATH, "How much?\nA. 1\nB. 4"),
        ("plain", "mmstar", UNREAD, "Which? A is 1, B is 2"),
        (
            "vlmevalkit",
            "mmstar",
            CHOICE,
            "Question: What is shown?\nOptions:\nA. fox\nB. a kite\nC. C\n"
            "Please select the correct answer from the options above. \n",
        ),
        (
            "vlmevalkit",
            "mmbench",
            HINTED,
            "Hint: It is night.\nLook.\nQuestion: What is shown?\nOptions:\nA. fox\nB. a kite\nC. C\n"
            "Please select the correct answer from the options above. \n",
        ),
        (
            "vlmevalkit",
            "mmstar",
            UNREAD,
            "Question: Which? A is 1, B is 2\nPlease select the correct answer from the options above. \n",
        ),
        ("vlmevalkit", "hallusionbench", YES_NO, "Is it a fox?"),
        ("vlmevalkit", "mmvet", Question("1", "graded", "Why?", "x<OR>y"), "Why?"),
        ("vlmevalkit", "mathvista", MATH, "Hint: Say it.\nQuestion: How much?"),
        (
            "vlmevalkit-11b",
            "ai2d",
            CHOICE,
            "Look at the scientific diagram carefully and answer the following question: What is shown?\n"
            "A. fox\nB. a kite\nC. C\nThink step by step and finally respond to the question with only the correct "
            'option number as "FINAL ANSWER".<cot_start>Let\'s think step by step.',
        ),
        ("vlmevalkit-11b", "mathvista", MATH, "Hint: Say it.\nQuestion: How much?"),
        ("vlmevalkit-11b", "hallusionbench", YES_NO, "Is it a fox?"),
        (
            "authors",
            "ai2d_unmasked",
            CHOICE,
            "Look at the scientific diagram carefully and answer the following question: What is shown?\n"
            "A. fox\nB. a kite\nC. C\nRespond only with the correct option digit.",
        ),
        ("authors", "mathvista", MATH, "Hint: Say it.\nQuestion: How much?"),
    ],
)
def test_a_prompt_is_worded_as_it_was_published(preset, name, question, prompt):
    assert prompt_of(name, question, preset) == prompt


def test_the_authors_asked_as_vlmevalkit_does_where_they_have_no_prompt_of_their_own():
    for name in ("mmstar", "mmbench", "mmvet", "hallusionbench"):
        assert prompt_of(name, HINTED, "authors") == prompt_of(name, HINTED, "vlmevalkit")


@pytest.mark.parametrize("name", ["world", "custom"])
def test_the_authors_did_not_ask_what_they_did_not_measure(name):
    with pytest.raises(ValueError, match=f"preset 'authors' must be used with one of .*, got '{name}'"):
        prompt_of(name, CHOICE, "authors")


def test_an_unknown_preset_is_refused():
    with pytest.raises(ValueError, match=r"preset must be one of \['plain', 'vlmevalkit', .*\], got 'best'"):
        prompt_of("mmstar", CHOICE, "best")


def test_every_default_preset_exists():
    assert {benchmark.default_preset for benchmark in BENCHMARKS.values()} <= set(PRESETS)
