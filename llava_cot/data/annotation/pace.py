"""A rate limit as a schedule: every start has its time, spaced so that no minute holds more than it may."""

import asyncio
import time


class Pace:
    """Spaces starts evenly: after one of ``amount`` the next waits ``amount * 60 / per_minute`` seconds.

    Even spacing has no burst, so that limits that a server checks by the second hold too.

    Args:
        per_minute: requests or tokens; None for no limit.
    """

    def __init__(self, per_minute: float | None) -> None:
        self._seconds = 0.0 if per_minute is None else 60 / per_minute
        self._next = 0.0

    async def wait(self, amount: float = 1) -> None:
        """Return when a start of ``amount`` is due; first come, first served."""
        now = time.monotonic()
        at = max(now, self._next)
        self._next = at + amount * self._seconds
        if at > now:
            await asyncio.sleep(at - now)

    def correct(self, amount: float) -> None:
        """The last start took this much more than was said, or less where it is negative."""
        self._next += amount * self._seconds

    def hold(self, seconds: float) -> None:
        """Nothing new starts for so long: the server said so."""
        self._next = max(self._next, time.monotonic() + seconds)
