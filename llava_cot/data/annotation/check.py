"""Whether a reply is an annotation at all, before anyone judges what it says."""

import re

from llava_cot.stages import LLAVA_COT, STAGES, render

_SECTIONS = re.compile(r"\s*".join(f"{stage.open_tag}(.*?){stage.close_tag}" for stage in STAGES), re.DOTALL)
_SPECIAL = re.compile(r"<\|\w+\|>")  # would become a control token in training
_LEAK = re.compile(
    r"\b(?:reference|standard|ground[- ]truth|given|provided|supplied) answer\b(?! (?:choice|option))"
    r"|\banswer (?:that )?(?:was|I was|we were) (?:given|provided|told|supplied)\b(?! by)",
    re.IGNORECASE,
)


def violation(text: str) -> str | None:
    """Why ``text`` is no four sections, in words; None if it is."""
    if (found := LLAVA_COT.violation(text)) is not None:
        return found
    sections = _SECTIONS.fullmatch(text.strip())
    if sections is None:
        return "there is text outside the four sections"
    for stage, section in zip(STAGES, sections.groups()):
        if not section.strip():
            return f"{stage} is empty"
    if special := _SPECIAL.search(text):
        return f"the text has the special token {special[0]}"
    if leak := _LEAK.search(text):
        return f"the text tells that an answer was given: {leak[0]!r}"
    return None


def sections_of(text: str) -> dict[str, str]:
    """The stripped sections of a text without a violation."""
    return {stage: found.text for stage, found in LLAVA_COT.parse(text).items()}


def tidy(text: str) -> str:
    """A text without a violation, with the spacing of LLaVA-CoT-100k."""
    return render(sections_of(text))
