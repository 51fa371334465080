"""Our own rules. They read what an answer says outright and never choose between two readings."""

import re

from llava_cot.evaluate.question import Question, Verdict
from llava_cot.evaluate.rules.compat import REFUSALS
from llava_cot.evaluate.rules.options import find_option
from llava_cot.evaluate.rules.phrases import boxed, plain, sentence, statements, words
from llava_cot.evaluate.rules.quantities import Quantity, find_quantity, quantities, spelled, unit_of
from llava_cot.text import normalise

SHORT = 6  # words of an answer that is read as nothing but the answer
_LEADING = re.compile(r"[\W_]*(yes|no)\b(?! or\b| and no\b) ?([^\w ]?) ?(\w*)", re.IGNORECASE)
_YES_OR_NO = re.compile(r"\b(yes|no)\b", re.IGNORECASE)
_NO_AT_THE_END = re.compile(r"\bno[)\"']*(?:$|[.,;:!\n])", re.IGNORECASE)
# "No dog is here" has "no" as a determiner. Before a mark or one of these words it is an answer.
_PRONOUNS = frozenset({"it", "they", "there", "this", "that", "these", "those", "the", "he", "she", "i", "we", "you"})
_AFTER_NO = _PRONOUNS | {"", "because", "since", "as"}
_LIST = re.compile(r"\[([^\[\]]*)\]")
_SEPARATOR = re.compile(r",(?![0-9]{3}(?![0-9]))|;|\band\b")


def strict(question: Question, answer: str) -> Verdict:
    """Return the verdict of our own rules; ``find_option`` and ``find_quantity`` list them for options and numbers.

    A refusal is a wrong answer. A text that gives no answer, or several, leaves the verdict open.
    """
    if question.kind == "graded":
        return Verdict(None, None, "needs a judge")
    if question.kind == "yes_no":
        verdict = _yes_no(question, answer)
    elif question.kind == "choice" or question.choices:
        letter, rule = find_option(answer, question.choices)
        verdict = _verdict(letter, question.letter, rule)
    elif question.answer_type == "list":
        verdict = _list(question, answer)
    else:
        verdict = _number(question, answer) or _text(question, answer)
    if verdict.score is None and any(refusal in answer for refusal in REFUSALS):
        return Verdict(0.0, None, "refusal")
    return verdict


def _verdict(found: str | None, right: str | None, rule: str) -> Verdict:
    return Verdict(None if found is None else float(found == right), found, rule)


def _yes_no(question: Question, answer: str) -> Verdict:
    word, rule = _find_yes_or_no(answer)
    return _verdict(word and word.capitalize(), question.answer.capitalize(), rule)


def _find_yes_or_no(answer: str) -> tuple[str | None, str]:
    """Return "yes" or "no" by an answer phrase or box, as the leading word, or as the only one of both."""
    text = plain(answer)
    if (box := boxed(answer)) is not None:
        return (box, "box") if box in ("yes", "no") else (None, "a box without yes or no")
    for _, rest in statements(text):
        if (match := _LEADING.match(rest)) and not rest[: match.start(1)].strip(" \"'(:"):
            return match[1].lower(), "answer phrase"
    if (match := _LEADING.match(text)) and _is_answer(match):
        return match[1].lower(), "leading word"
    said = {match[1].lower() for match in _YES_OR_NO.finditer(text)}
    if said == {"yes"}:
        return "yes", "only yes"
    if said == {"no"} and _NO_AT_THE_END.search(text):
        return "no", "only no"
    return None, "both yes and no" if len(said) > 1 else "neither yes nor no"


def _is_answer(leading: re.Match[str]) -> bool:
    return leading[1].lower() == "yes" or leading[2] != "" or leading[3].lower() in _AFTER_NO


def _number(question: Question, answer: str) -> Verdict | None:
    """The verdict on a number, or None if the right answer is no number."""
    right = quantities(spelled(question.answer))
    if len(right) != 1 or (question.answer_type == "text" and not _is_number(question.answer)):
        return None
    unit = unit_of(question.unit) or right[0].unit
    found, rule = find_quantity(answer)
    if found is None:
        return Verdict(None, None, rule)
    precision = question.precision if question.answer_type == "float" else None
    is_right = found.equals(Quantity(right[0].value, unit), precision)
    return Verdict(float(is_right), str(found), rule)


def _is_number(text: str) -> bool:
    return re.fullmatch(r"[-$€£¥]*[0-9.]+(?:/[0-9]+)? ?\D{0,4}", spelled(text)) is not None


def _list(question: Question, answer: str) -> Verdict:
    """Compare lists item by item. Without brackets, the numbers of a text are a list if there are as many."""
    right, box = _items(question.answer), boxed(answer)
    text = plain(answer) if box is None else box
    listed = _LIST.findall(text)
    if listed:
        found, rule = _items(f"[{listed[-1]}]"), "list"
    else:
        said = next((sentence(rest) for _, rest in statements(text)), text)
        found, rule = [str(quantity) for quantity in quantities(spelled(said))], "numbers in order"
        if len(found) != len(right):
            found, rule = _items(said), "list without brackets"
            if len(found) != len(right):
                return Verdict(None, None, "no list")
    is_right = len(found) == len(right) and all(_equal(a, b, question.precision) for a, b in zip(found, right))
    return Verdict(float(is_right), f"[{', '.join(found)}]", rule)


def _items(text: str) -> list[str]:
    listed = _LIST.search(text)
    parts = re.split("[,;]", listed[1]) if listed else _SEPARATOR.split(text)
    return [item for part in parts if (item := normalise(part))]


def _equal(found: str, right: str, precision: int | None) -> bool:
    numbers = quantities(found), quantities(right)
    if all(len(each) == 1 for each in numbers):
        return numbers[0][0].equals(numbers[1][0], precision)
    return found == right


def _text(question: Question, answer: str) -> Verdict:
    """Compare free text: the whole of it, or what an answer phrase says. A longer text can't be told."""
    right = question.answer
    if normalise(right) in ("yes", "no"):
        word, rule = _find_yes_or_no(answer)
        return _verdict(word, normalise(right), rule)
    box = boxed(answer)
    said = [plain(answer), *(sentence(rest) for _, rest in statements(plain(answer)))] if box is None else [box]
    for text in said:
        if normalise(text) == normalise(right) or _bare(text) == _bare(right):
            return Verdict(1.0, normalise(text), "text")
    shortest = said[1] if len(said) > 1 else said[0]
    if len(words(shortest)) <= SHORT:
        return Verdict(0.0, normalise(shortest), "text")
    return Verdict(None, None, "free text")


def _bare(text: str) -> list[str]:
    found = words(text)
    return found[1:] if len(found) > 1 and found[0] in ("a", "an", "the") else found
