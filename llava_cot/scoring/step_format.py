"""How a step reward model is shown a question and the steps of a candidate, and where its scores are read."""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from llava_cot.core import check_kind, check_kinds
from llava_cot.stages import Grammar

Split = Callable[[str], Sequence[str]]


@dataclass(frozen=True)
class StepFormat:
    """The chat that a step reward model was trained on. It is plain data: the model's chat template writes the turns.

    With ``in_turns`` each step is a turn of the user, and ``mark`` is the assistant's reply to it. The score of a step
    is read where the reply begins. Without it all steps stand in one turn of the assistant, with ``mark`` behind each,
    and the score of a step is read at its mark.

    Args:
        in_turns: whether steps and marks are alternating turns.
        mark: what is written after every step, also after a bad one. It must be one token.
        verdicts: the tokens for a good and for a bad step. The score is the softmax of the first against the second.
            None is for a model whose head gives one label per token (the score is its sigmoid) or two (the score is
            the softmax of the second, as TRL and Qwen2.5-Math-PRM number them).
        prompt: the user's text before the first step. ``{question}`` stands for the question, and ``{images}`` for the
            images, which come first if it is left out. With ``in_turns`` the first step follows in the same turn.
        between: the text between a mark and the next step, if they are not in turns.
        system: the system prompt that the model was trained with, or None for a chat without one. An empty one stands
            for a prompt that is still to be given: ``dataclasses.replace(QWEN_VL_PRM, system=...)``.

    Raises:
        ValueError: an empty mark, verdicts that are not two different texts, or a prompt without ``{question}``.
        TypeError: an argument of another type.
    """

    in_turns: bool
    mark: str = "+"
    verdicts: tuple[str, str] | None = ("+", "-")
    prompt: str = "{question}"
    between: str = "\n"
    system: str | None = None

    def __post_init__(self) -> None:
        check_kinds(self)
        if not self.mark:
            raise ValueError("mark must be a text of one token, got ''")
        if self.verdicts is not None:
            check_kind("verdicts", self.verdicts, (tuple, list), "a pair of texts or None")
            if len({*self.verdicts}) != 2 or not all(isinstance(one, str) and one for one in self.verdicts):
                raise ValueError(f"verdicts must be two different texts, got {self.verdicts!r}")
        if self.prompt.count("{question}") != 1:
            raise ValueError(f"prompt must have the field {{question}} once, got {self.prompt!r}")


# Qwen-VL-PRM-3B and 7B (arXiv 2509.23250): a plain Qwen2.5-VL. Its system prompt is published with its code.
QWEN_VL_PRM = StepFormat(
    in_turns=True, prompt="{images}### Question:\n{question}\n\n### Solution Process:\n", system=""
)

# VisualPRM-8B and v1.1 (arXiv 2503.10291), in transformers' own InternVL form. Its system prompt is published with it.
VISUAL_PRM = StepFormat(
    in_turns=True, prompt="### Question:\n{images}\n{question}\n\n### Solution Process:\n", system=""
)


def paragraphs(text: str) -> list[str]:
    """Return the parts of ``text`` between blank lines. This is how Qwen-VL-PRM and VisualPRM split an answer."""
    return [part.strip() for part in re.split(r"\n\s*\n", text) if part.strip()] or [text.strip()]


def steps_of(text: str, grammar: Grammar, split: Split | None = None) -> list[str]:
    """Return the steps of a path: its stages, or the pieces into which ``split`` takes the text of each.

    Tags are no part of a step. Text outside of all stages is a step of its own, so that nothing is left unread.

    Raises:
        TypeError: ``split`` does not return a list of texts.
    """
    bodies = _bodies(text, grammar)
    if split is None:
        return bodies
    steps = list[str]()
    for body in bodies:
        pieces = split(body)
        if isinstance(pieces, str) or not all(isinstance(piece, str) for piece in pieces):
            raise TypeError(f"split must return a list of texts, got {pieces!r}")
        steps += [piece.strip() for piece in pieces]
    return steps


def _bodies(text: str, grammar: Grammar) -> list[str]:
    if grammar.turns:  # no tag of the model ends a reply
        return [text[part.start : part.end].strip() for part in grammar.parts(text)]
    closing = "|".join(sorted(map(re.escape, (stop.text for stop in grammar.stops)), key=len, reverse=True))
    any_tag = "|".join(sorted(map(re.escape, grammar.all_tags), key=len, reverse=True))
    ends = [found.end() for found in re.finditer(closing, text)] if closing else []
    parts = [text[start:end] for start, end in zip([0, *ends], [*ends, len(text)])]
    if not parts[-1].strip():
        del parts[-1]
    return [(re.sub(any_tag, "", part) if any_tag else part).strip() for part in parts]
