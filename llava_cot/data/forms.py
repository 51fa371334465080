"""How a row spells a prompt and a completion: as messages, or as the text that a chat template makes of them.

What TRL (read in 1.16) takes with an ``images`` column: ``prompt`` and ``completion`` (or ``chosen`` and ``rejected``)
either both as messages or both as text, one way for a whole data set. With messages the prompt has a
``{"type": "image"}`` part for each image, the template ends the completion's turn, and a prompt that ends with an
assistant's turn is **not** continued: TRL renders prompt and completion as two turns, so that the completion becomes
"end of turn, header, text". Text is tokenized as it stands, without a BOS or an EOS of the tokenizer's.

So what was drawn in the middle of an answer can be trained by TRL as text alone, and ``TextForm`` is for that. The
messages of ``MessageForm`` are exact for whole answers; with a prefix they are for trainers of one's own, which render
the prompt with ``continue_final_message=True``.
"""

from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from transformers import ProcessorMixin

Messages = list[dict[str, Any]]


class Form(Protocol):
    def prompt(self, question: str, prefix: str, bos: str) -> Messages | str:
        """The image and the question, then what the model has written already; ``bos`` is the generator's."""
        ...

    def completion(self, text: str, is_end: bool) -> Messages | str:
        """What is written next; ``is_end``: the turn ends behind it."""
        ...


class MessageForm:
    """Conversational rows; a prefix is an unfinished assistant's turn, the prompt's last."""

    def prompt(self, question: str, prefix: str, bos: str) -> Messages:
        user = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}
        return [user, *self.completion(prefix, False)] if prefix else [user]

    def completion(self, text: str, is_end: bool) -> Messages:
        return [{"role": "assistant", "content": [{"type": "text", "text": text}]}]


class TextForm:
    """Rows of plain text, the image as the image token of ``processor``'s chat template.

    Raises:
        ValueError: the template has no visible end of a turn.
    """

    def __init__(self, processor: "ProcessorMixin") -> None:
        self._processor = processor
        marker = "the answer stands here"
        messages = [*MessageForm().prompt("?", "", "one"), *MessageForm().completion(marker, True)]
        _, found, self.end = processor.apply_chat_template(messages).partition(marker)
        if not found or not self.end.strip():
            raise ValueError(f"processor must have a chat template that ends an assistant's turn, got {self.end!r}")

    def prompt(self, question: str, prefix: str, bos: str) -> str:
        user = MessageForm().prompt(question, "", bos)
        text = self._processor.apply_chat_template(user, add_generation_prompt=True)
        token = self._processor.tokenizer.bos_token or ""
        # As build_inputs has it: whoever tokenizes the row adds no BOS.
        return (token if bos == "released" or not text.startswith(token) else "") + text + prefix

    def completion(self, text: str, is_end: bool) -> str:
        return text + (self.end if is_end else "")


MESSAGES = MessageForm()
