"""A candidate while it grows: what replies have added to it, and when it has ended."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from llava_cot.backends.openai.wire import Piece, Prefix
from llava_cot.core import Continuation, Expand, Finish


@dataclass(eq=False)
class Draft:
    """A continuation of ``parent`` that is drawn with ``seed``, in one reply or in several.

    A budget may cut a reply before anything else ends it. Then the draft goes on with what the budget has left.
    """

    request: Expand
    parent: Prefix
    seed: int
    pieces: list[Piece] = field(default_factory=list)
    finish: Finish | None = None

    @property
    def count(self) -> int:
        """Its tokens so far."""
        return sum(piece.count for piece in self.pieces)

    @property
    def text(self) -> str:
        return "".join(piece.text for piece in self.pieces)

    @property
    def prefix(self) -> Prefix:
        """Everything that the model has written from the end of the prompt to its end."""
        tokens = self.parent.tokens
        for piece in self.pieces:
            tokens = None if tokens is None or piece.tokens is None else tokens + piece.tokens
        return Prefix(self.parent.text + self.text, tokens)

    @property
    def stops(self) -> frozenset[int] | None:
        """The numbers of the tags that end it; None is all of them."""
        return None if self.request.stops is None else self.request.stops | self.request.trims

    def add(self, piece: Piece, most: int) -> None:
        """Add a piece of which ``most`` tokens were asked for."""
        self.pieces.append(piece)
        if piece.stop is not None:
            self.finish = Finish.TAG
        elif not piece.is_cut:
            self.finish = Finish.EOS
        elif piece.count < most or self.count >= self.request.max_new_tokens:
            self.finish = Finish.LENGTH  # of the request, or of the model's context

    def continuation(self, id: int, parent: int, tokens: tuple[int, ...], tags: Sequence[str]) -> Continuation:
        """Return it as the search gets to see it, with the tokens that stand for its text."""
        stop = self.pieces[-1].stop if self.pieces else None
        return Continuation(
            id,
            parent,
            tokens,
            self.text,
            tuple(value for piece in self.pieces for value in piece.logprobs),
            tuple(value for piece in self.pieces for value in piece.sampling_logprobs),
            tuple(value for piece in self.pieces for value in piece.entropies),
            tuple(value for piece in self.pieces for value in piece.certainties),
            self.finish,
            -1 if stop is None else tags.index(stop),
            self.seed,
        )
