"""A question and a candidate as the chat that a reward model for text reads."""

from collections.abc import Collection
from typing import TYPE_CHECKING

from llava_cot.chat import render
from llava_cot.literal import marked, token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def chat_text(question: str, text: str, tokenizer: "PreTrainedTokenizerBase") -> str:
    """Return a user's turn and a whole turn of the assistant, as the chat template of ``tokenizer`` writes them."""
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": text}]
    return render(tokenizer, turns, add_generation_prompt=False)


def chat_ids(
    question: str, text: str, tokenizer: "PreTrainedTokenizerBase", *, tags: Collection[str] = ()
) -> list[int]:
    """Return the tokens of ``chat_text``. Special tokens that the two texts spell are text, but for ``tags``.

    The template has written all special tokens. So these are the ids of ``tokenizer.apply_chat_template``.

    Raises:
        ValueError: see ``llava_cot.literal.token_ids``.
    """
    return token_ids(chat_text(marked(question, tokenizer), marked(text, tokenizer, keep=tags), tokenizer), tokenizer)


def check_template(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raise ``ValueError`` unless ``tokenizer`` has a chat template that writes both turns."""
    if not tokenizer.chat_template:
        raise ValueError(
            "processor must have a chat template, got a tokenizer without one: set its chat_template to that of the "
            "chats that the reward model was trained on"
        )
    question, text = "the question stands here", "the candidate stands here"
    written = chat_text(question, text, tokenizer)
    if question not in written or text not in written:
        raise ValueError(f"processor must have a chat template that writes both turns of a chat, got {written!r}")
