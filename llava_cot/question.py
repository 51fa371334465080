"""Questions: a text or a conversation, checked, and as a list of messages. No torch."""

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

from llava_cot.literal import MARK

# A text, or a conversation whose last message is the user's. A message is {"role": "user", "content": ...}, and its
# content is a text or a list of {"type": "text", "text": ...} and {"type": "image"}.
Question = str | Sequence[Mapping[str, Any]]

ROLES = ("system", "user", "assistant")


def question_text(question: Question) -> str:
    """Return the text of a question: in a conversation, that of the last message."""
    if isinstance(question, str):
        return question
    return "".join(part.get("text", "") for part in _parts(question[-1]))


def check_question(question: Any) -> None:
    """Raise ``ValueError`` unless ``question`` is a non-empty text or a conversation, of characters that UTF-8 has."""
    if not isinstance(question, (list, tuple)):
        _check_text("question", question)
        return
    for at, message in enumerate(question):
        name = f"question[{at}]"
        if not isinstance(message, Mapping) or message.get("role") not in ROLES or "content" not in message:
            got = reprlib.repr(message)
            raise ValueError(f"{name} must be a message with a role of {list(ROLES)} and a content, got {got}")
        if not isinstance(message["content"], (str, list, tuple)):
            got = reprlib.repr(message["content"])
            raise ValueError(f"the content of {name} must be a string or a list of parts, got {got}")
        if message["role"] == "system" and at:
            raise ValueError(f"{name} must not be a system prompt, which only comes first")
        for part in _parts(message):
            if not isinstance(part, Mapping) or part.get("type") not in ("text", "image"):
                got = reprlib.repr(part)
                raise ValueError(f"{name} must have parts of the type 'text' or 'image', got {got}")
            if part["type"] == "text":
                _check_text(f"the text of {name}", part.get("text"))
    if not question or question[-1]["role"] != "user" or not question_text(question).strip():
        raise ValueError(f"question must end with a message of the user with a text, got {reprlib.repr(question)}")


def _check_text(name: str, text: Any) -> None:
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{name} must be a non-empty string, got {text!r}")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        half = text[error.start]
        raise ValueError(f"{name} must be Unicode text, got half a character {half!a} at {error.start}") from None
    if MARK in text:
        raise ValueError(f"{name} must be Unicode text, got the noncharacter {MARK!a} at {text.index(MARK)}")


def _parts(message: Mapping[str, Any]) -> Sequence[Any]:
    content = message["content"]
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def messages_of(question: Question, images: int, system: str | None) -> list[dict[str, Any]]:
    """Return the conversation with a list of parts for each message."""
    if isinstance(question, str):
        question = [{"role": "user", "content": question}]
    messages = [{"role": each["role"], "content": [dict(part) for part in _parts(each)]} for each in question]
    if system is not None:
        if messages[0]["role"] == "system":
            raise ValueError("system must be None for a conversation that begins with a system prompt of its own")
        messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
    placed = sum(part["type"] == "image" for message in messages for part in message["content"])
    if placed and placed != images:
        raise ValueError(f"question must have a part of the type 'image' for each image={images}, got {placed}")
    if not placed:
        first = next(message for message in messages if message["role"] == "user")
        first["content"][:0] = [{"type": "image"} for _ in range(images)]
    return messages
