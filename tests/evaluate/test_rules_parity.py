"""``compat`` against VLMEvalKit's own functions on made-up predictions, 300 a benchmark.

The packaged VLMEvalKit, ms-vlmeval 0.0.20, is of May 2026. In June VLMEvalKit's letter rule got one more step, "answer
is B"; verdicts by that step are left out here, and tests/evaluate/test_rules_table.py has cases of it.
"""

import random

import pytest
from helpers.vlmeval_source import vlmeval_functions

from llava_cot.evaluate.question import Question
from llava_cot.evaluate.rules import judge

COUNT = 300
NOUNS = ("cat", "catfish", "a dog", "red car", "car", "8", "18", "3.5", "none of these", "both A and B", "the left one")
LETTER_TEMPLATES = (
    *("{l}", "({l})", "{l}.", "**{l}**", "{l}: {t}", "{l}. {t}", "({l}) {t}", "[{l}]", "# {l}", "{{{l}}}", "{l}) {t}"),
    *("Answer: {l}", "The answer is {l}.", "the correct answer is **{l}**", "Option {l}", "It is {l}!", "{l} or {o}"),
    *("{l}, because {o} is wrong", "A closer look gives {l}", "{l} fits best among all that are offered", "<{l}>"),
    *("I think that after a long look it is {l}", "{t}", "{t}.", "It is {t}", "Not {t} but {u}", "{t} and {u}"),
    *("I see {t} in the picture, and so I would say that this is it", "Sorry, I can't help with images of people yet."),
    *(
        "Z",
        "I can't process this file.",
        "Cannot determine the answer",
        "Failed to obtain answer via API.",
        "",
        " ",
        "??",
    ),
)
YES_NO_TEMPLATES = (
    *(
        "{w}",
        "{w}.",
        "{w}, it is",
        "{w},it is",
        "**{w}**",
        "{w}: so",
        "({w})",
        "[{w}]",
        "{w}!",
        "'{w}'",
        "{w}; so",
        "{w}/{v}",
    ),
    *(
        "{w} or {v}",
        "There is no gap: {w}",
        "The answer is {w}.",
        "I say {w}",
        "{w}-ish",
        "not",
        "nothing",
        "yesterday",
    ),
    *(
        "{w}.It is",
        "{w}. It is 1,000 m",
        "{w} (1,000)",
        "3.5 {w}.",
        "{w}" + "." * 40,
        "a. b. " * 20 + "{w}.",
        "",
        "maybe",
    ),
)
NUMBER_TEMPLATES = (
    *(
        "{n}",
        " {n} ",
        "{n}.",
        "+{n}",
        "0{n}",
        "{n}.0",
        "{n} m",
        "${n}",
        "The answer is {n}",
        "-{n}",
        "{n}e0",
        "1_0",
        "nan",
    ),
    *("inf", "", "ten", "{n}\n", "{n}4", "[{n}]", "1,000", "\uff11\uff14", "None"),
)


def spelled(text, draw):
    return draw.choice([text, text, text, text.lower(), text.upper(), text.capitalize()])


def choices_of(draw, count):
    return dict(zip("ABCDEFGH", draw.sample(NOUNS, count)))


def letter_answer(draw, choices):
    letter, other = draw.sample([*choices], 2)
    text = draw.choice(LETTER_TEMPLATES).format(l=letter, o=other, t=choices[letter], u=choices[other])
    return spelled(text, draw) if draw.random() < 0.3 else text


@pytest.mark.parametrize("name, counts", [("MMStar", [4]), ("MMBench", [2, 3, 4]), ("AI2D", [4, 5])])
def test_choices(name, counts):
    can_infer = vlmeval_functions("utils/matching_util.py", "can_infer", "can_infer_option", "can_infer_text")[0]
    draw, newer, inferred = random.Random(name), 0, 0
    for _ in range(COUNT):
        choices = choices_of(draw, draw.choice(counts))
        answer, right = letter_answer(draw, choices), draw.choice([*choices])
        verdict = judge(Question("q", "choice", "Which?", right, choices=choices), answer, "compat")
        if verdict.rule == "answer is":
            newer += 1
            continue
        found = can_infer(answer, dict(choices))
        assert (verdict.extracted or False) == found, answer
        assert verdict.correct == (found == right if found else None)
        inferred += bool(found)
    assert COUNT / 4 < inferred < COUNT - newer, "both outcomes must occur"
    assert newer < COUNT / 5


def test_hallusion_bench():
    process = vlmeval_functions("smp/misc.py", "process_punctuation")
    extract = vlmeval_functions("dataset/utils/yorn.py", "YOrN_Extraction", process_punctuation=process)
    draw, seen = random.Random("HallusionBench"), set()
    for _ in range(COUNT):
        word, other = draw.sample(["Yes", "No"], 2)
        answer = spelled(draw.choice(YES_NO_TEMPLATES).format(w=word, v=other), draw)
        right, found = draw.choice(["Yes", "No"]), extract(answer)
        verdict = judge(Question("q", "yes_no", "Is it?", right), answer, "compat")
        assert (verdict.extracted or "Unknown") == found, answer
        assert (verdict.correct or False) == (found == right)  # as in exact matching, where unknown is wrong
        seen.add(found)
    assert seen == {"Yes", "No", "Unknown"}


def test_math_vista():
    """Its comparison, of what the judge extracts, on the whole text; and what it finds before it asks the judge."""
    can_infer = vlmeval_functions("utils/matching_util.py", "can_infer", "can_infer_option", "can_infer_text")[0]
    post_check = vlmeval_functions("dataset/utils/mathvista.py", "post_check", "list_to_dict", can_infer=can_infer)[0]
    draw, right_ones = random.Random("MathVista"), 0
    for _ in range(COUNT):
        kind = draw.choice(["multi_choice", "integer", "float", "list", "text"])
        line = {"question_type": "free_form", "answer_type": kind, "choices": "[]", "answer_option": ""}
        choices = {}
        if kind == "multi_choice":
            choices = choices_of(draw, draw.choice([2, 3, 4, 5]))
            letter = draw.choice([*choices])
            answer = letter_answer(draw, choices)
            line |= {"question_type": kind, "answer_type": "text", "answer": choices[letter], "answer_option": letter}
            line["choices"] = repr([*choices.values()])
        else:
            numbers = {"integer": ["14", "1", "10", "14.0"], "float": ["1.45", "14", "0.5"]}
            line["answer"] = draw.choice(numbers.get(kind, ["None", "[14]", "14", "red"]))
            answer = draw.choice(NUMBER_TEMPLATES).format(n=draw.choice([line["answer"], "14", "13"]))
        kinds = {"answer_type": line["answer_type"], "choices": choices}
        for question_kind in ("choice", "open") if choices else ("open",):
            right = line["answer_option"] if question_kind == "choice" else line["answer"]
            verdict = judge(Question("q", question_kind, "What?", right, **kinds), answer, "compat")
            if verdict.rule == "answer is":
                continue
            line |= {"prediction": answer, "res": answer}
            assert (verdict.correct or False) == bool(post_check(line, prefetch=False)), (line, verdict)
            prefetched = post_check(line, prefetch=True)
            if choices:
                assert (verdict.extracted or False) == prefetched, line
            elif prefetched:
                assert verdict.correct, line
        right_ones += bool(verdict.correct)
    assert COUNT / 10 < right_ones < COUNT * 9 / 10
