"""Turn a rate limit into a schedule: starts are spaced so that no minute exceeds the limit."""

import asyncio
import time


class Pace:
    """Spaces starts evenly. After a start of ``amount``, the next one waits ``amount * 60 / per_minute`` seconds.

    Even spacing has no bursts, so limits that a server checks every second hold too.

    Args:
        per_minute: the limit of requests or tokens a minute, or None for no limit.
    """

    def __init__(self, per_minute: float | None) -> None:
        self._seconds = 0.0 if per_minute is None else 60 / per_minute
        self._next = 0.0

    async def wait(self, amount: float = 1) -> None:
        """Return when a start of ``amount`` is due. Starts are served in the order of the calls."""
        now = time.monotonic()
        at = max(now, self._next)
        self._next = at + amount * self._seconds
        if at > now:
            await asyncio.sleep(at - now)

    def correct(self, amount: float) -> None:
        """Note that the last start took this much more than announced, or less if it is negative."""
        self._next += amount * self._seconds

    def hold(self, seconds: float) -> None:
        """Start nothing for so long, because the server said so."""
        self._next = max(self._next, time.monotonic() + seconds)
