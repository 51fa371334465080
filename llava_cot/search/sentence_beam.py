"""Sentence-level beam search, a baseline of arXiv 2411.10440v1: the best continuations, sentence by sentence."""

from dataclasses import dataclass

from llava_cot.core import Program
from llava_cot.scoring import resolve_scorer
from llava_cot.search.sample import Scored
from llava_cot.search.search import Scope, Search
from llava_cot.search.tree import Node


@dataclass(frozen=True)
class SentenceBeamConfig(Scored):
    """``candidates`` sentences are drawn in all, spread over the beams (at least one each); the best ``keep`` go on.

    A sentence ends with a full stop, a question mark or an exclamation mark before white space, or with a closing tag.
    A beam that has ended stays in the pool, and the search ends when every kept beam has ended. Beams compare by the
    score of the whole path, or with ``scope="stage"`` by that of the last sentence alone.
    """

    candidates: int = 4
    keep: int = 2
    scope: Scope = "path"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("candidates", "keep"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be >= 1, got {getattr(self, name)}")
        if self.scope not in ("stage", "path"):
            raise ValueError(f"scope must be 'stage' or 'path', got {self.scope!r}")

    @property
    def max_generations(self) -> None:
        return None  # a text may have any number of sentences


def sentence_beam(search: Search, config: SentenceBeamConfig) -> Program[list[Node]]:
    scorer, growing, round = resolve_scorer(config.scorer), [search.root], 0
    ended: list[Node] = []
    while growing:
        round += 1
        n = max(1, config.candidates // len(growing))
        nodes = yield from search.expand_sentence(growing, n, params=config.params(), round=round)
        pool = [*ended, *nodes]
        yield from search.score(pool, scorer, config.scope)
        kept = search.best(pool, config.keep)
        search.keep(nodes, kept, pool=pool)
        growing = [node for node in kept if search.can_continue(node)]
        ended = [node for node in kept if node not in growing]
    best = search.best(ended, config.num_return_sequences)
    for node in best[0].path():
        search.final(node)
    return best
