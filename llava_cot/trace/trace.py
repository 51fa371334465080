"""A trace in memory, with the queries of those who show it or learn from it."""

from collections.abc import Collection, Iterable
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from llava_cot.stages import Grammar, asked
from llava_cot.trace.schema import NodeData, TraceData
from llava_cot.trace.writer import to_json

if TYPE_CHECKING:
    from rich.tree import Tree

    from llava_cot.image import Images


@dataclass(frozen=True)
class Trace:
    """Everything that a search did: its settings, every candidate, every decision, and its cost.

    ``data`` is not checked. Read data from outside with ``parse_trace`` or ``read_trace``, which check it.
    """

    data: TraceData = field(repr=False)

    @cached_property
    def nodes(self) -> dict[int, NodeData]:
        """Every candidate by id. Parents come before their children."""
        return {node["id"]: node for node in self.data["nodes"]}

    @cached_property
    def grammar(self) -> Grammar:
        grammar = self.data["grammar"]
        return Grammar(**grammar)

    @cached_property
    def drawn_after_budget(self) -> frozenset[int]:
        """The ids of the candidates that were drawn after the budget was spent, to finish an answer greedily."""
        kinds = [event["event"] for event in self.data["events"]]
        start = kinds.index("budget_spent") if "budget_spent" in kinds else len(kinds)
        after = _of_kinds(self.data["events"][start:], ("generated",))
        return frozenset(id for event in after for id in event["nodes"])

    @property
    def failure(self) -> str | None:
        """The exception that ended a failed search, on one line; None if none did."""
        error = self.data["error"]
        return error and " ".join(f"{error['type']}: {error['message']}".split())

    @property
    def is_running(self) -> bool:
        """Whether the search was still running when the trace was made: it has neither an answer nor an error."""
        return self.data["answer"] is None and self.data["error"] is None

    def events(self, *kinds: str) -> list[dict[str, Any]]:
        """Return the events of these kinds, e.g. ``"retraced"``, in order. ``trace.schema.EVENTS`` lists the kinds."""
        return _of_kinds(self.data["events"], kinds)

    def path(self, id: int | None) -> list[NodeData]:
        """Return the candidates from the first stage to node ``id``. Empty for 0, the prompt, and for None."""
        path: list[NodeData] = []
        while id:
            path.append(self.nodes[id])
            id = path[-1]["parent"]
        return path[::-1]

    def text(self, id: int | None) -> str:
        """Return what the model wrote from the start of its answer to the end of node ``id``, tags included.

        Between its replies stand the user's turns, as ``llava_cot.stages.asked`` shows them.
        """
        return "".join(asked(node["turn"]) + node["text"] for node in self.path(id))

    def to_json(self, indent: int | None = None) -> str:
        """Return the trace as strict JSON, in which inf, -inf and NaN are the strings "inf", "-inf" and "nan"."""
        return to_json(self.data, indent)

    def to_html(
        self,
        *,
        image: "Images" = None,
        question: str | None = None,
        gold: str | None = None,
    ) -> str:
        """Return one self-contained HTML page. ``image`` is shown on it; ``gold`` is the right answer, if known."""
        from llava_cot.report.html import to_html

        return to_html(self, image=image, question=question, gold=gold)

    def to_fragment(self, *, image: "Images" = None, question: str | None = None, gold: str | None = None) -> str:
        """Return the body of the page that ``to_html`` returns, for a page that has its style and its script."""
        from llava_cot.report.html import to_fragment

        return to_fragment(self, image=image, question=question, gold=gold)

    def to_tree(self) -> "Tree":
        """Return a tree that ``rich`` prints in a terminal."""
        from llava_cot.report.tree import to_tree

        return to_tree(self)

    def _repr_html_(self) -> str:
        from llava_cot.report.html import to_frame

        return to_frame(self)


def _of_kinds(events: Iterable[Any], kinds: Collection[str]) -> list[dict[str, Any]]:
    return [event for event in events if event["event"] in kinds]
