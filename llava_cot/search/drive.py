"""The driver that pumps a search program into a session of a back end, until the program returns."""

import threading
from typing import Any

from llava_cot.core import Program, Replies, Session, requests_of


class Drive:
    """Runs ``program`` on ``session``. It starts at once and goes on whenever the back end replies.

    When it has ended, ``done`` is true. Then ``result`` is what the program returned, or ``error`` is what it raised.
    The session is closed at the end. Keep a reference for as long as the search is to run: the engine drops the work of
    a session that nobody holds any more.
    """

    def __init__(self, session: Session, program: Program[Any]) -> None:
        self.session, self._program = session, program
        self.result: Any = None
        self.error: Exception | None = None
        self.done = False
        self._is_asking = self._is_cancelled = False
        self._replies: list[Replies] = []
        self._passing = threading.Lock()  # a reply may come from another thread while this one asks
        self._advance(None)

    def cancel(self) -> None:
        """End the search without a result, and give back everything that it holds. Any thread may call this."""
        self._is_cancelled = True
        if not self.done:
            self._end()

    def _advance(self, reply: Any) -> None:
        """Send ``reply`` to the program and ask for what it wants next. Repeat while replies arrive at once."""
        while not self.done:
            if isinstance(reply, Exception):  # the session has ended
                self.error = reply
                return self._end()
            failure = next((part for part in reply or () if isinstance(part, Exception)), None)
            try:
                requests = requests_of(self._program.throw(failure) if failure else self._program.send(reply))
            except StopIteration as stop:
                self.result = None if self._is_cancelled else stop.value
                return self._end()
            except Exception as error:
                self.error = error
                return self._end()
            except BaseException as error:  # such as KeyboardInterrupt, in whichever thread steps
                self.error = RuntimeError(f"the search was interrupted: {error!r}")
                self._end()
                raise
            if self._is_cancelled:
                return self._end()
            self._is_asking = True
            try:
                self.session.ask(requests, self._receive)
            except (TypeError, ValueError) as error:
                self.error = error
                return self._end()
            with self._passing:
                self._is_asking = False
                if not self._replies:
                    return
                reply = self._replies.pop()

    def _receive(self, reply: Replies) -> None:
        with self._passing:
            if self._is_asking:
                self._replies.append(reply)
                return
        self._advance(reply)

    def _end(self) -> None:
        try:
            self._program.close()
        except Exception as error:
            if isinstance(error, ValueError) and "already executing" in str(error):
                return  # it is running, in another thread or further up this one's stack; it ends when it yields
            self.error = self.error or error  # raised while the program cleaned up
        finally:
            self.session.close()
        self.done = True
