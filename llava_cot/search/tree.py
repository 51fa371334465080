"""The tree of a search: every candidate that was drawn, kept or not."""

from dataclasses import dataclass, field
from hashlib import blake2b

from llava_cot.core import Continuation, Finish
from llava_cot.stages import asked
from llava_cot.trace.schema import NodeData


def candidate_seed(seed: int, stage: str | None, round: int, parent: int, index: int) -> int:
    """A candidate's own seed, in [0, 2**63): a hash of where it stands in the tree, never of a batch row."""
    place = f"{seed}/{stage or ''}/{round}/{parent}/{index}".encode()
    return int.from_bytes(blake2b(place, digest_size=8).digest(), "little") >> 1


@dataclass(eq=False)
class Node:
    """A candidate that was drawn from ``parent``, which is None for the root. It is one stage, or with ``stage`` None a
    whole answer or a part of one.

    ``closed``: it ended as it should, with its own closing tag, or with EOS for a whole answer. ``opens`` is the stage
    that its last tokens have opened, where that stage's heading ended it. ``violation`` says how
    a stage's candidate left the grammar, ``error`` why it has no score of its own (it ranks with -inf then), and
    ``notes`` what its scorer has to tell, such as the scores that it combined. ``turn`` is the user's turn that asked
    for it, if one did, and ``given`` are its tokens, which the model read between those of the parent and its own.
    """

    id: int
    parent: "Node | None"
    stage: str | None
    round: int
    index: int
    continuation: Continuation
    score: float | None = None
    kept: bool = False
    seconds: float = 0.0  # from the start of the search to its last token
    closed: bool = False
    opens: str | None = None
    violation: str | None = None
    error: str | None = None
    notes: dict[str, float] = field(default_factory=dict)
    turn: str = ""
    given: tuple[int, ...] = ()

    @property
    def text(self) -> str:
        """The text that was drawn for it, tags included."""
        return self.continuation.text

    @property
    def tokens(self) -> tuple[int, ...]:
        return self.continuation.tokens

    @property
    def logprobs(self) -> tuple[float, ...]:
        """The log-probs of its tokens under the model, in nats."""
        return self.continuation.logprobs

    @property
    def finish(self) -> Finish | None:
        return self.continuation.finish

    def path_tokens(self) -> tuple[int, ...]:
        """All token ids that were drawn from the end of the prompt to here."""
        return tuple(token for node in self.path() for token in node.tokens)

    def read_tokens(self) -> tuple[int, ...]:
        """All token ids from the end of the prompt to here, the user's turns included."""
        return tuple(token for node in self.path() for token in (*node.given, *node.tokens))

    def replies(self) -> list[tuple[str, list[int]]]:
        """The tokens that were drawn from the end of the prompt to here, reply by reply, each behind its user's turn.

        The turn of the first reply is empty: the prompt has asked for it.
        """
        found: list[tuple[str, list[int]]] = [("", [])]
        for node in self.path():
            if node.turn:
                found.append((node.turn, []))
            found[-1][1].extend(node.tokens)
        return found

    def path_text(self) -> str:
        """The text from the end of the prompt to here, with the user's turns as ``stages.asked`` shows them."""
        return "".join(asked(node.turn) + node.text for node in self.path())

    def path(self) -> list["Node"]:
        """The nodes from the first stage to this one, without the root."""
        return [*self.parent.path(), self] if self.parent else []

    def rank(self) -> tuple:
        """Sort key, the best first: closed nodes before others, then by score, then by (round, parent, index)."""
        if self.score is None or self.parent is None:
            raise ValueError(f"node {self.id} must have a score to be ranked: yield from search.score(nodes, scorer)")
        return (not self.closed, -self.score, self.round, self.parent.id, self.index)

    def to_dict(self) -> NodeData:
        """The node as the trace stores it. The root is not in a trace."""
        if self.parent is None:
            raise ValueError("node must not be the root")
        continuation = self.continuation
        return {
            "id": self.id,
            "parent": self.parent.id,
            "stage": self.stage and str(self.stage),
            "round": self.round,
            "index": self.index,
            "seed": continuation.seed,
            "turn": self.turn,
            "given": [*self.given],
            "text": self.text,
            "tokens": [*continuation.tokens],
            "logprobs": [*continuation.logprobs],
            "sampling_logprobs": [*continuation.sampling_logprobs],
            "entropies": [*continuation.entropies],
            "finish": continuation.finish and continuation.finish.value,
            "closed": self.closed,
            "violation": self.violation,
            "score": self.score,
            "error": self.error,
            "notes": self.notes,
            "kept": self.kept,
            "seconds": self.seconds,
        }


def stages_of(node: Node) -> list[str]:
    """The stages on the way to ``node``."""
    return [ancestor.stage for ancestor in node.path() if ancestor.stage is not None]
