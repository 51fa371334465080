"""Work of the host that searches ask for."""

from collections.abc import Sequence
from typing import Any

from llava_cot.core import Call


def call_together(calls: list[Call]) -> dict[Call, Sequence[Any] | Exception]:
    """The results of every call, or what it raised; those of equal functions are made together."""
    results: dict[Call, Sequence[Any] | Exception] = {}
    for call in calls:
        if call in results:
            continue
        same = [other for other in calls if other not in results and other.function == call.function]
        try:
            values = list(call.function([item for other in same for item in other.items]))
            if len(values) != sum(len(other.items) for other in same):
                raise ValueError(f"{call.function} must return one result per item, got {len(values)}")
            for other in same:
                results[other], values = values[: len(other.items)], values[len(other.items) :]
        except Exception as error:
            # Whose fault it was shows when each is alone.
            alone = {call: error} if len(same) == 1 else {k: v for o in same for k, v in call_together([o]).items()}
            results |= alone
    return results
