"""Count tokens and their cost, for one record, for a run, and for a run that is still to come."""

import math
from dataclasses import asdict, dataclass
from typing import Any

from llava_cot.data.annotation.prompts import Message

CHARACTERS_PER_TOKEN = 4  # of English text, roughly
ANNOTATION_TOKENS = 400  # a four-section reply, about 350 in LLaVA-CoT-100k
VERDICT_TOKENS = 40


@dataclass
class Usage:
    """Requests and tokens so far."""

    requests: int = 0  # all that were sent, including failed ones
    prompt_tokens: int = 0
    completion_tokens: int = 0

    def add(self, other: "Usage") -> None:
        self.requests += other.requests
        self.prompt_tokens += other.prompt_tokens
        self.completion_tokens += other.completion_tokens

    def to_dict(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True)
class Prices:
    """USD per million tokens."""

    prompt: float
    completion: float

    def __post_init__(self) -> None:
        for name, price in (("price_in", self.prompt), ("price_out", self.completion)):
            if not 0 <= price < math.inf:
                raise ValueError(f"{name} must be >= 0, got {price}")

    def cost(self, usage: Usage) -> float:
        """Return the cost in USD."""
        return (usage.prompt_tokens * self.prompt + usage.completion_tokens * self.completion) / 1e6


@dataclass(frozen=True)
class Estimate:
    """The remaining work. ``usage`` has the expected tokens and the most requests without retries."""

    records: int
    turns: int
    usage: Usage
    measured: int  # records that the figures come from; 0 if they come from the lengths of texts
    cost: float | None  # USD; None without prices

    def __str__(self) -> str:
        source = f"from the {self.measured} records so far" if self.measured else "from the lengths of the texts"
        cost = "" if self.cost is None else f", {dollars(self.cost)}"
        usage = self.usage
        return (
            f"{self.records} records, {self.turns} turns to annotate: about {usage.requests} requests, "
            f"{usage.prompt_tokens} prompt and {usage.completion_tokens} completion tokens{cost} ({source})"
        )


def dollars(cost: float) -> str:
    return f"${cost:.4f}" if cost < 1 else f"${cost:.2f}"


def prompt_tokens(messages: list[Message], image_tokens: int) -> int:
    """Estimate the tokens of a chat. An image counts ``image_tokens``."""
    count = 0
    for message in messages:
        content: Any = message["content"]
        parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
        for part in parts:
            count += image_tokens if part["type"] == "image_url" else text_tokens(part["text"])
    return count


def text_tokens(text: str) -> int:
    return math.ceil(len(text) / CHARACTERS_PER_TOKEN)
