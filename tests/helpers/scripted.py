"""Search policies without an engine: every request is answered from a script."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from llava_cot.engine.branch import Branch, Finish
from llava_cot.search.search import Search
from llava_cot.search.tree import Node
from llava_cot.stages import LLAVA_COT, STAGES

PROMPT_LENGTH = 10


@dataclass
class Draft:
    """What one candidate turns out to be: ``length`` times one token, which nobody else has unless it is named."""

    score: float = 0.0
    finish: Finish = Finish.TAG
    tag: int | None = None  # by default that of its own stage
    token: int | None = None
    length: int = 1
    text: str | None = None  # by default its token ids
    logprob: float = -1.0  # of each token
    closes: str | None = None  # the stage whose tag ends it, by name instead of ``tag``


@dataclass
class Play:
    """What a policy did: ``scored`` has the spans of each call of the scorer."""

    search: Search
    result: Any = None
    scored: list[list] = field(default_factory=list)
    events: list = field(default_factory=list)
    requests: list = field(default_factory=list)

    def nodes(self, stage=None, round=None) -> list[Node]:
        return [
            node
            for node in self.search.nodes[1:]
            if (stage is None or node.stage == stage) and (round is None or node.round == round)
        ]

    def kept(self, stage) -> list[Node]:
        return [node for node in self.nodes(stage) if node.kept]


Script = Callable[[str | None, int, int, int], Draft]  # (stage, round, parent among its stage's parents, index)


def play(
    policy,
    make_config,
    script: Script,
    *,
    seed=0,
    max_new_tokens=1000,
    calibration=None,
    wrong_scores=None,
    grammar=LLAVA_COT,
) -> Play:
    """Run ``policy`` to its end on ``make_config(scorer=...)``; the scorer gives every candidate its draft's score.

    With another grammar ``script`` is told which stages may come next, as "ONE|OTHER".
    """
    fresh, scores, texts = itertools.count(1000), {}, {}

    def decode(tokens):
        return texts.get(tokens[-1], str(tokens))

    root = Branch(None, 0, PROMPT_LENGTH)
    played = Play(Search(root, decode, seed, max_new_tokens, calibration, grammar=grammar))
    played.search.on_event = played.events.append

    def scorer(spans):
        played.scored.append(list(spans))
        return wrong_scores or [scores[span.tokens[-1]] for span in spans]

    def candidate(request, parent, index) -> Branch:
        tags, ancestor = [], request.parent
        while ancestor.parent is not None:
            tags, ancestor = [ancestor.tag, *tags], ancestor.parent
        depth = len(tags)
        if grammar is LLAVA_COT:
            stage = STAGES[depth].value if request.stops and depth < len(STAGES) else None
        else:
            stage = "|".join(grammar.allowed([grammar.names[tag] for tag in tags]))
        draft = script(stage, len(played.search.retraces) + 1, parent, index)
        token = next(fresh) if draft.token is None else draft.token
        length = min(draft.length, request.max_new_tokens)
        cut = length == request.max_new_tokens and draft.length > length
        scores[token] = draft.score
        if draft.text is not None:
            texts[token] = draft.text
        branch = Branch(request.parent, 0, request.parent.length + length, seed=request.seeds[index])
        branch.tokens, branch.logprobs, branch.entropies = [token] * length, [draft.logprob] * length, [1.0] * length
        branch.finish = Finish.LENGTH if cut else draft.finish
        if branch.finish is Finish.TAG:
            branch.tag = depth if draft.tag is None else draft.tag
            if draft.closes is not None:
                branch.tag = grammar.names.index(draft.closes)
        return branch

    coroutine, reply = policy(played.search, make_config(scorer=scorer)), None
    while True:
        try:
            requests = coroutine.send(reply)
        except StopIteration as stop:
            played.result = stop.value[0] if isinstance(stop.value, list) else stop.value
            return played
        played.requests += requests
        reply = [
            [candidate(request, parent, index) for index in range(len(request.seeds))]
            for parent, request in enumerate(requests)
        ]
