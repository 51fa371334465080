"""What a running search has to tell so far, for whoever streams it."""

from collections.abc import Callable

from llava_cot.search.events import Event, TextDelta
from llava_cot.search.run import SearchRun
from llava_cot.text import Detokeniser


class EventStream:
    """The events of ``run``, which appends to ``events``, and between them the text of a search without stages.

    Of a search whose every token stands at once (a trait of its configuration) new text comes as ``TextDelta``.
    """

    def __init__(self, run: SearchRun, events: list[Event], decode: Callable[[list[int]], str]) -> None:
        self._run, self._events = run, events
        self._detokeniser = Detokeniser(decode) if run.plan.config.streams_tokens else None
        self._num_shown = 0  # tokens

    def take(self) -> list[Event]:
        """What has happened since the last call."""
        found: list[Event] = []
        if self._detokeniser is not None and (text := self._new_text(self._detokeniser)):
            found.append(TextDelta(text))
        found += self._events
        self._events.clear()
        return found

    def _new_text(self, detokeniser: Detokeniser) -> str:
        tokens: tuple[int, ...] = ()
        if self._run.done:
            tokens = self._run.result[0].path_tokens() if self._run.result else ()
        else:
            tokens = next(iter(self._run.search.session.growing), ())
        new = tokens[self._num_shown :]
        if not new and not self._run.done:
            return ""
        self._num_shown = max(self._num_shown, len(tokens))
        return detokeniser.add(new, is_last=self._run.done)
