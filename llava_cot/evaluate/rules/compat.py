"""VLMEvalKit's rules as of its commit e8e78f05 (August 2026), without its judge.

Where VLMEvalKit would ask a judge, and draw a random option if the judge fails too, the verdict is that the rules can't
tell. VLMEvalKit's "exact matching" counts such an answer as wrong, so that its number is our lower bound. The
environment variable VERBOSE, which changes VLMEvalKit's verdicts, counts as not set.
"""

import re
from collections.abc import Mapping

from llava_cot.evaluate.question import Question, Verdict

REFUSALS = (
    "Sorry, I can't help with images of people yet.",
    "I can't process this file.",
    "I'm sorry, but without the image provided",
    "Cannot determine the answer",
)
_FAILED_REQUEST = "Failed to obtain answer via API"
_LAST_TOKENS = 4  # the only letter counts if it first stands among these
_SEPARATORS = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
# Since June 2026. Nothing has to follow the letter: "The answer is between 3 and 4" gives B.
_ANSWER_IS = re.compile(r"answer\s+is\s+\**([ABCD])", re.IGNORECASE)

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_FULL_STOP = re.compile(r"(?<!\d)\.(?!\d)")
_FULL_STOPS = 32  # the first so many go, since VLMEvalKit passes re.UNICODE, which is 32, as the count
_THOUSANDS = re.compile(r"\d,\d")


def compat(question: Question, answer: str) -> Verdict:
    """Return the verdict of VLMEvalKit's rules.

    They are ``can_infer`` for choices and ``YOrN_Extraction`` for yes and no. An open question is compared as in
    MathVista, where a text is a number only if it is nothing else.
    """
    if question.kind == "graded":
        return Verdict(None, None, "needs a judge")
    if question.kind == "yes_no":
        word = _yes_or_no(answer)
        return _verdict(word, question.answer, "word" if word else "neither or both of yes and no")
    if question.kind == "choice" or question.choices:
        letter, rule = _letter(answer, question.choices)
        if letter is None:
            letter, rule = _by_text(answer, question.choices)
        return _verdict(letter, question.letter, rule)
    return _open(question, answer)


def _verdict(found: str | None, right: str | None, rule: str) -> Verdict:
    return Verdict(None if found is None else float(found == right), found, rule)


def _letter(answer: str, choices: Mapping[str, str]) -> tuple[str | None, str]:
    """Return the letter that is named and how; "Z" is a refusal, which is a wrong answer."""
    if _FAILED_REQUEST in answer:
        return None, "failed request"
    if any(refusal in answer for refusal in REFUSALS):
        return "Z", "refusal"
    tokens = answer.translate(_SEPARATORS).split()
    named = [letter for letter in choices if letter in tokens]
    if len(named) == 1 and tokens.index(named[0]) >= len(tokens) - _LAST_TOKENS:
        return named[0], "only letter"
    if not named and "Z" in tokens:
        return "Z", "letter Z"
    if (said := _ANSWER_IS.search(answer)) and said[1].upper() in choices:
        return said[1].upper(), "answer is"
    return None, "no letter"


def _by_text(answer: str, choices: Mapping[str, str]) -> tuple[str | None, str]:
    """Return the letter of the only option whose text is a part of a short ``answer``."""
    answer = answer.lower()
    if len(answer) > 2 * sum(map(len, choices.values())):
        return None, "no letter, and too long to look for an option's text"
    named = [letter for letter, text in choices.items() if text.lower() in answer]
    if len(named) == 1:
        return named[0], "option text"
    return None, f"no letter, and the texts of {len(named)} options"


def _yes_or_no(answer: str) -> str | None:
    text = answer = answer.lower()
    for mark in _PUNCTUATION:
        beside_space = mark + " " in answer or " " + mark in answer or _THOUSANDS.search(answer)
        text = text.replace(mark, "" if beside_space else " ")
    words = _FULL_STOP.sub("", text, _FULL_STOPS).split()
    said = [word for word in ("yes", "no") if word in words]
    return said[0].capitalize() if len(said) == 1 else None


def _open(question: Question, answer: str) -> Verdict:
    if question.answer_type not in ("integer", "float"):
        # It compares "None" with the right answer, whatever was extracted.
        return Verdict(float(question.answer == "None"), None, "lists and text never match")
    number: type[int | float] = int if question.answer_type == "integer" else float
    try:
        value = number(answer)
    except ValueError:
        return Verdict(None, None, "not a number alone")
    try:
        is_right = value == number(question.answer)
    except ValueError:  # an integer whose right answer is written as "14.0"
        is_right = False
    return Verdict(float(is_right), answer.strip(), "number alone")
