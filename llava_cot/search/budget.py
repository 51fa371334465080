"""Budgets: what a search may cost at most."""

from dataclasses import dataclass, fields

from llava_cot.core import Limit, Usage, check_kinds

RESERVED = ("generated_tokens", "seconds")  # finishing an answer spends these


@dataclass(frozen=True)
class Budget:
    """Limits of one search, in the units of ``Usage``; None is no limit.

    A search stops when it has spent all but ``reserve`` of its generated tokens or seconds, or all of anything else.
    The reserve, a share in [0, 1), pays for finishing greedily from the best prefix. If it is spent too, the answer is
    cut. No limit is exceeded by more than one step: one token of every growing candidate, or the prompt.

    Raises:
        ValueError: a limit that is not above 0, or a reserve outside [0, 1).
    """

    generated_tokens: int | None = None
    generations: int | None = None
    prompt_tokens: int | None = None
    image_encodings: int | None = None
    scorer_calls: int | None = None
    seconds: float | None = None
    reserve: float = 0.25

    def __post_init__(self) -> None:
        check_kinds(self)
        for name, value in self.limits().items():
            if not value > 0:
                raise ValueError(f"budget.{name} must be > 0, got {value}")
        if not 0 <= self.reserve < 1:
            raise ValueError(f"budget.reserve must be in [0, 1), got {self.reserve}")

    def limits(self) -> dict[str, float]:
        """The limits that are set, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "reserve"}
        return {name: value for name, value in values.items() if value is not None}

    def limit(self, *, finishing: bool = False) -> Limit:
        """The limit at which the search stops. While it is ``finishing``, only tokens and seconds count, in full."""
        if finishing:
            return Limit(**{name: value for name, value in self.limits().items() if name in RESERVED})
        shares = {name: 1 - self.reserve if name in RESERVED else 1.0 for name in self.limits()}
        return Limit(**{name: shares[name] * value for name, value in self.limits().items()})

    def spent(self, usage: Usage) -> str | None:
        """The name of a limit that is reached, apart from the reserve for finishing, or None."""
        return self.limit().reached(usage)
