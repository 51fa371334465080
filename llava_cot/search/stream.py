"""The events of a running search, in the order in which a stream yields them."""

from llava_cot.detokenise import Detokeniser
from llava_cot.search.events import Event, TextDelta
from llava_cot.search.run import SearchRun


class EventStream:
    """Takes events from ``events``, to which ``run`` appends, and adds the new text where no token is ever taken back.

    New text comes as ``TextDelta``, only from searches whose configuration says that they stream tokens. Where the
    grammar has turns of the user there is none, since whole replies come as ``StageFinal``, and without a detokeniser
    there is none either.
    """

    def __init__(self, run: SearchRun, events: list[Event], detokeniser: Detokeniser | None) -> None:
        self._run, self._events = run, events
        self._detokeniser = detokeniser if run.plan.config.streams_tokens and not run.search.grammar.turns else None
        self._num_shown = 0  # tokens

    def take(self) -> list[Event]:
        """The events since the last call."""
        found: list[Event] = []
        if self._detokeniser is not None and (text := self._new_text(self._detokeniser)):
            found.append(TextDelta(text))
        count = len(self._events)  # another thread may append meanwhile
        found += self._events[:count]
        del self._events[:count]
        return found

    def _new_text(self, detokeniser: Detokeniser) -> str:
        tokens: tuple[int, ...] = ()
        if self._run.done:
            tokens = self._run.result[0].path_tokens() if self._run.result else ()
        else:
            tokens = next(iter(self._run.search.session.growing), ())
        new = tokens[self._num_shown :]
        self._num_shown += len(new)
        return detokeniser.add(new)
