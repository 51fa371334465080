"""Write a prompt and a completion as messages, or as the text that a chat template makes of them.

With an ``images`` column, TRL (1.16) takes ``prompt`` and ``completion`` (or ``chosen`` and ``rejected``) either both
as messages or both as text, in one way for a whole data set. With messages the prompt has a ``{"type": "image"}`` part
for each image, and the template ends the turn of the completion. A prompt that ends with an assistant's turn is **not**
continued. TRL renders prompt and completion as two turns, so the completion becomes "end of turn, header, text". Text
is tokenized unchanged, without a BOS or an EOS from the tokenizer.

So TRL can train on a completion from the middle of an answer only as text, and ``TextForm`` is for that. The messages
of ``MessageForm`` are exact for whole answers. With a prefix they are for trainers that render the prompt with
``continue_final_message=True``.

In text, what a question spells looks like what the template wrote. So ``TextForm`` puts a mark (``llava_cot.literal``)
into each special token that a question spells. ``objective: dpo`` takes the marks out of the tokens, and reads what the
search read. To TRL a mark is a character of the text, U+FDD0, and the special token is text all the same.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from llava_cot.chat import turn_text
from llava_cot.literal import SPECIAL_TOKEN, marked, special_tokens

if TYPE_CHECKING:
    from transformers import ProcessorMixin

Messages = list[dict[str, Any]]
# What the model has read and written behind a question: pairs of a turn of the user and the model's reply. The first
# turn is empty, since the question stands in its place. The last reply may be unfinished, or empty.
Chat = Sequence[tuple[str, str]]


class Form(Protocol):
    def prompt(self, question: str, prefix: Chat, bos: str) -> Messages | str:
        """Return the image and the question, followed by ``prefix``. ``bos`` is the generator's."""
        ...

    def completion(self, text: str, is_end: bool) -> Messages | str:
        """Return the text that is written next. With ``is_end`` the turn ends after it."""
        ...


class MessageForm:
    """Writes conversational rows. An unfinished reply is an assistant's turn, the last one of the prompt."""

    def prompt(self, question: str, prefix: Chat, bos: str) -> Messages:
        messages: Messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
        for left, (turn, reply) in zip(reversed(range(len(prefix))), prefix):
            if turn:
                messages.append({"role": "user", "content": [{"type": "text", "text": turn}]})
            if reply or left:
                messages += self.completion(reply, False)
        return messages

    def completion(self, text: str, is_end: bool) -> Messages:
        return [{"role": "assistant", "content": [{"type": "text", "text": text}]}]


class TextForm:
    """Writes rows of plain text. The image is the image token of ``processor``'s chat template.

    Special tokens that a question spells are marked. So are those of the model's text that the template writes too, or
    that look like ``<|eot_id|>``. Others may be stage tags, which a fine-tune may have added as special tokens.

    Raises:
        ValueError: the template has no visible end of a turn.
    """

    def __init__(self, processor: "ProcessorMixin") -> None:
        self._processor = processor
        marker = "the answer stands here"
        messages = [*MessageForm().prompt("?", [], "one"), *MessageForm().completion(marker, True)]
        written = processor.apply_chat_template(messages)
        self._control = set(special_tokens(processor.tokenizer).pattern.findall(written))
        _, found, self.end = written.partition(marker)
        if not found or not self.end.strip():
            raise ValueError(f"processor must have a chat template that ends an assistant's turn, got {self.end!r}")

    def prompt(self, question: str, prefix: Chat, bos: str) -> str:
        tokenizer = self._processor.tokenizer
        user = MessageForm().prompt(marked(question, tokenizer), [], bos)
        text = self._processor.apply_chat_template(user, add_generation_prompt=True)
        token = tokenizer.bos_token or ""
        # The text has the BOS, as in build_inputs, so tokenizing the row must not add one.
        text = (token if bos == "released" or not text.startswith(token) else "") + text
        for turn, reply in prefix:
            text += (turn_text(self._processor, marked(turn, tokenizer)) if turn else "") + self._drawn(reply)
        return text

    def completion(self, text: str, is_end: bool) -> str:
        return self._drawn(text) + (self.end if is_end else "")

    def _drawn(self, text: str) -> str:
        tokenizer = self._processor.tokenizer
        spelled = set(special_tokens(tokenizer).pattern.findall(text)) - self._control
        return marked(text, tokenizer, keep={token for token in spelled if not SPECIAL_TOKEN.fullmatch(token)})


MESSAGES = MessageForm()
