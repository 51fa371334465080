"""Render a conversation by the chat template of a processor or a tokenizer."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from llava_cot.literal import marked, token_ids

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

# Llama 3.2's template writes today's date into a conversation without an image. This is its own default, a fixed date,
# so that the same question has the same answer tomorrow, and a model is asked as it was trained.
DATE = "26 Jul 2024"
_SENTINEL = "\u2060written\u2060"


def render(
    processor: "ProcessorMixin | PreTrainedTokenizerBase",
    messages: list[dict[str, Any]],
    *,
    add_generation_prompt: bool,
    **settings: Any,
) -> str:
    """Return the text of ``messages`` as the template writes it.

    Their contents are lists of parts, or strings where a tokenizer's template takes those. ``settings`` are variables
    of the template, such as ``enable_thinking``.
    """
    date = {"date_string": DATE} if "date_string" in (processor.chat_template or "") else {}
    settings = {**date, **settings, "tokenize": False, "add_generation_prompt": add_generation_prompt}
    return processor.apply_chat_template(messages, **settings)


def turn_text(processor: "ProcessorMixin | PreTrainedTokenizerBase", text: str, **settings: Any) -> str:
    """Return what the template writes between an assistant's reply and the next one, with the user's ``text`` in it.

    ``text`` is in it as it is, so what it spells must be ``marked`` if it is text alone. ``settings`` are variables of
    the template.

    Raises:
        ValueError: the template does not write a second turn of the user behind the assistant's.
    """

    def message(role: str, text: str) -> dict[str, Any]:
        return {"role": role, "content": [{"type": "text", "text": text}]}

    turns = [message("user", "?"), message("assistant", _SENTINEL), message("user", text)]
    try:
        written = render(processor, turns, add_generation_prompt=True, **settings)
    except Exception as error:  # a template raises what it wants
        raise ValueError(f"chat_template must take a second turn of the user, but it raises {error!r}") from error
    _, found, behind = written.partition(_SENTINEL)
    if not found or text.strip() not in behind:
        raise ValueError(f"chat_template must write a second turn of the user, got {written!r}")
    return behind


def turn_tokens(processor: "ProcessorMixin", text: str, written: Sequence[int], **settings: Any) -> tuple[int, ...]:
    """Return the tokens of ``turn_text`` behind a reply whose tokens are ``written``.

    Special tokens that ``text`` spells are not read as such. The first token is the special one that ends a turn,
    so no word is split at the seam. It is left out if the reply ends with it.
    """
    tokenizer = processor.tokenizer
    tokens = token_ids(turn_text(processor, marked(text, tokenizer), **settings), tokenizer)
    has_ended = list(written[-1:]) == tokens[:1]
    return tuple(tokens[has_ended:])
