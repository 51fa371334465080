"""Format numbers for reports."""

import math


def number(value: float | None) -> str:
    if value is None:
        return "–"
    if math.isinf(value):
        return "∞" if value > 0 else "−∞"
    return f"{value:{'.3f' if abs(value) >= 0.01 or value == 0 else '.2g'}}".replace("-", "−")


def count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
