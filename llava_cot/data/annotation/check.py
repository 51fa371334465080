"""Check that a reply is an annotation at all, before its content is judged."""

import re

from llava_cot.data.checks import SPECIAL_TOKEN, text_outside
from llava_cot.stages import LLAVA_COT, render

_LEAK = re.compile(
    r"\b(?:reference|standard|ground[- ]truth|given|provided|supplied) answer\b(?! (?:choice|option))"
    r"|\banswer (?:that )?(?:was|I was|we were) (?:given|provided|told|supplied)\b(?! by)",
    re.IGNORECASE,
)


def violation(text: str) -> str | None:
    """Say why ``text`` is not four valid sections, or return None if it is."""
    if (found := LLAVA_COT.violation(text)) is not None:
        return found
    if text_outside(text):
        return "there is text outside the four sections"
    for stage, section in sections_of(text).items():
        if not section:
            return f"{stage} is empty"
    if special := SPECIAL_TOKEN.search(text):
        return f"the text has the special token {special[0]}"
    if leak := _LEAK.search(text):
        return f"the text tells that an answer was given: {leak[0]!r}"
    return None


def sections_of(text: str) -> dict[str, str]:
    """Return the stripped sections of a text without a violation."""
    return {stage: found.text for stage, found in LLAVA_COT.parse(text).items()}


def tidy(text: str) -> str:
    """Return a text without a violation in the spacing of LLaVA-CoT-100k."""
    return render(sections_of(text))
