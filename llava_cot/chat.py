"""Render a conversation by the chat template of a processor or a tokenizer."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase, ProcessorMixin

# Llama 3.2's template writes today's date into a conversation without an image. This is its own default, a fixed date,
# so that the same question has the same answer tomorrow, and a model is asked as it was trained.
DATE = "26 Jul 2024"


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
