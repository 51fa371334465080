"""What a search may cost at most."""

from dataclasses import dataclass, fields

from llava_cot.engine.job import Usage

RESERVED = ("generated_tokens", "seconds")  # what finishing an answer takes


@dataclass(frozen=True)
class Budget:
    """Limits of one search, in the units of ``Usage``; None is no limit.

    A search that has spent all but ``reserve`` of its generated tokens or seconds, or all of anything else, stops where
    it is: the reserve is for finishing greedily from the best prefix, which is cut where that is spent too. So no
    limit is exceeded by more than one step: a token of every growing candidate, or the prompt.

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

    def __post_init__(self):
        for name, limit in self.limits().items():
            if not limit > 0:
                raise ValueError(f"budget.{name} must be > 0, got {limit}")
        if not 0 <= self.reserve < 1:
            raise ValueError(f"budget.reserve must be in [0, 1), got {self.reserve}")

    def limits(self) -> dict[str, float]:
        """Those that there are, by name."""
        values = {field.name: getattr(self, field.name) for field in fields(self) if field.name != "reserve"}
        return {name: limit for name, limit in values.items() if limit is not None}

    def spent(self, usage: Usage, *, finishing: bool = False) -> str | None:
        """The name of a limit that is reached, or None; while ``finishing`` of those alone that have a reserve."""
        for name, limit in self.limits().items():
            has_reserve = name in RESERVED
            share = 1 - self.reserve if has_reserve and not finishing else 1
            if (has_reserve or not finishing) and getattr(usage, name) >= share * limit:
                return name
        return None
