"""The tokens of a question and of a candidate's steps, as a step reward model reads them."""

import re
import threading
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase, ProcessorMixin

from llava_cot.chat import render
from llava_cot.families import Prompt
from llava_cot.literal import MARK, marked, token_ids
from llava_cot.prompt import process
from llava_cot.scoring.step_format import StepFormat

QUESTION, STEP, REPLY = (f"\u2060{name}\u2060" for name in ("question", "step", "reply"))


class _Texts(NamedTuple):
    """What the chat template writes around a question and its steps; the last two are for formats in turns."""

    before_question: str
    before_first: str
    reply: str
    before_next: str


class StepChat:
    """Writes chats of one ``StepFormat`` for one processor, or for the tokenizer of a model that reads text only.

    A path is written piece by piece, so that a path that goes on begins with the same tokens, and its marks are where
    they were put: a candidate that spells a mark makes none. The score of a step is read at the end of its piece.

    Raises:
        ValueError: no chat template, one that does not write the turns, a mark or a verdict that is not one token, or
            an empty system prompt.
    """

    def __init__(self, format: StepFormat, processor: ProcessorMixin | PreTrainedTokenizerBase) -> None:
        if format.system == "":
            raise ValueError(
                "format.system must be the system prompt that the reward model was trained with, or None, got '': "
                "use dataclasses.replace(format, system=...)"
            )
        if not getattr(processor, "chat_template", None):
            raise ValueError(
                "processor must have a chat template, got one without: set its chat_template to that of the chats that "
                "the reward model was trained on"
            )
        self.format, self.processor = format, processor
        self.is_for_text = isinstance(processor, PreTrainedTokenizerBase)
        self.tokenizer: Any = getattr(processor, "tokenizer", processor)
        self.mark = self._one_token("mark", format.mark)
        self.verdicts: tuple[int, int] | None = None
        if format.verdicts is not None:
            good, bad = (self._one_token("verdicts", verdict) for verdict in format.verdicts)
            if good == bad:
                raise ValueError(f"format.verdicts must be different tokens, got {format.verdicts} of token {good}")
            self.verdicts = good, bad
        self._texts_of = {0: self._texts(0)}  # by the number of images
        self._writing = threading.Lock()  # tokenizers may not be used by two threads at once

    def prompt(self, question: str, images: Sequence[Image.Image]) -> Prompt:
        """Return the processor's inputs of the chat up to the first step."""
        with self._writing:
            return self._prompt(question, images)

    def _prompt(self, question: str, images: Sequence[Image.Image]) -> Prompt:
        texts = self._texts_of.setdefault(len(images), self._texts(len(images)))
        text = texts.before_question + marked(question, self.tokenizer) + texts.before_first.rstrip(" ")
        if self.is_for_text:
            return {"input_ids": torch.tensor([token_ids(text, self.tokenizer)])}
        return process(self.processor, images, text)

    def pieces(self, steps: Sequence[str], tags: Collection[str]) -> list[tuple[int, ...]]:
        """Return the tokens of each step behind those of the prompt and of the steps before it.

        Special tokens that a step spells are text, but for ``tags``.
        """
        with self._writing:
            return self._pieces(steps, tags)

    def _pieces(self, steps: Sequence[str], tags: Collection[str]) -> list[tuple[int, ...]]:
        texts, format = self._texts_of[0], self.format
        prompt_end = texts.before_first.rstrip(" ")
        first = texts.before_first.removeprefix(prompt_end)  # a space is part of the token behind it
        later = texts.before_next if format.in_turns else format.between
        pieces = list[tuple[int, ...]]()
        for step in steps:
            text = self._literal(step, tags) + texts.reply
            own = self._after(format.mark, later + text) if pieces else self._after(prompt_end[-1:], first + text)
            pieces.append((self.mark, *own) if format.in_turns and pieces else tuple(own))
        return pieces if format.in_turns else [(*piece, self.mark) for piece in pieces]

    def _texts(self, num_images: int) -> _Texts:
        format = self.format
        asked = format.prompt.replace("{question}", QUESTION) + (STEP if format.in_turns else "")
        before, has_place, behind = asked.rpartition("{images}")
        images = [{"type": "image"}] * num_images
        turns: list[tuple[str, list[dict[str, str]]]] = [("system", [_text(format.system)])] if format.system else []
        turns.append(("user", [*([_text(before)] if has_place and before else []), *images, _text(behind)]))
        turns.append(("assistant", [_text(REPLY if format.in_turns else STEP)]))
        if format.in_turns:
            turns += [("user", [_text(STEP)]), ("assistant", [_text(REPLY)])]
        messages: list[dict[str, Any]] = [
            {"role": role, "content": "".join(part["text"] for part in parts) if self.is_for_text else parts}
            for role, parts in turns
        ]
        written = render(self.processor, messages, add_generation_prompt=False)
        parts = re.split(f"{QUESTION}|{STEP}|{REPLY}", written)
        if len(parts) != (6 if format.in_turns else 3):
            raise ValueError(f"processor must have a chat template that writes every turn of a chat, got {written!r}")
        return _Texts(parts[0], parts[1], *(parts[2:4] if format.in_turns else ("", "")))

    def _literal(self, step: str, tags: Collection[str]) -> str:
        text, mark = marked(step, self.tokenizer, keep=tags), self.format.mark
        # An added token that is not special is found in any text too.
        return text.replace(mark, mark[0] + MARK + mark[1:]) if mark in self.tokenizer.get_added_vocab() else text

    def _after(self, before: str, text: str) -> list[int]:
        """Return the tokens of ``text`` where ``before`` stands in front of it, as some tokenizers add a space."""
        head, whole = token_ids(before, self.tokenizer), token_ids(before + text, self.tokenizer)
        return whole[len(head) :] if whole[: len(head)] == head else token_ids(text, self.tokenizer)

    def _one_token(self, name: str, text: str) -> int:
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) != 1 or ids[0] == self.tokenizer.unk_token_id:
            raise ValueError(f"format.{name} must be one token of the tokenizer, got {text!r} of tokens {ids}")
        return ids[0]


def _text(text: str | None) -> dict[str, str]:
    return {"type": "text", "text": text or ""}
