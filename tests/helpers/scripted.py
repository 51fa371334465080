"""A back end without a model: every request is answered from a script."""

import itertools
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from llava_cot.core import Continuation, Expand, Feature, Finish, Usage
from llava_cot.search.drive import Drive
from llava_cot.search.search import Search, stop_tags
from llava_cot.search.tree import Node
from llava_cot.stages import LLAVA_COT, STAGES, asked
from llava_cot_kernels.stage_tags import StageTags

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


class ScriptedSession:
    """A session whose continuations come from ``draw(session, request, parent, index)``."""

    def __init__(self, draw):
        self.root, self.usage, self.prompt_tokens = 0, Usage(), PROMPT_LENGTH
        self.growing: list[tuple[int, ...]] = []
        self.by_id = {0: Continuation(0, -1)}
        self.requests: list = []
        self.is_closed = False
        self._draw = draw

    def ask(self, requests, done):
        self.requests += requests
        done(
            [
                [self._add(request, at, index) for index in range(len(request.seeds))]
                for at, request in enumerate(requests)
            ]
        )

    def close(self):
        self.is_closed = True

    def _add(self, request, at, index):
        drawn = replace(self._draw(self, request, at, index), id=len(self.by_id))
        self.by_id[drawn.id] = drawn
        self.usage.generated_tokens += len(drawn.tokens)
        return drawn


def turn_bytes(turn, written):
    """A user's turn as a ``WritingSession`` reads it."""
    return tuple(asked(turn).encode())


class WritingSession(ScriptedSession):
    """A session whose model writes texts, a byte a token. The stop tags are found as the engine finds them.

    ``write(path_text, index)`` is what candidate ``index`` writes after a text, up to the end of its answer. Where a
    turn of the user stands in it, the model writes EOS and is asked.
    """

    def __init__(self, write, grammar):
        super().__init__(self._written)
        self._write, self._turns = write, [asked(turn) for turn in grammar.turns.values()]
        self._tags = StageTags([bytes([byte]) for byte in range(256)], stop_tags(grammar))
        self._states = {0: self._tags.start_state}

    def ask(self, requests, done):
        self.requests += requests
        replies = []
        for at, request in enumerate(requests):
            if isinstance(request, Expand):
                replies.append([self._add(request, at, index) for index in range(len(request.seeds))])
                continue
            given = Continuation(
                len(self.by_id),
                request.parent,
                request.tokens,
                bytes(request.tokens).decode(),
                (-1.0,) * len(request.tokens),
            )
            self.by_id[given.id], self._states[given.id] = given, self._tags.start_state
            self.usage.prompt_tokens += len(request.tokens)
            replies.append([given])
        done(replies)

    def path_text(self, id):
        text, at = "", self.by_id[id]
        while at.id != self.root:
            text, at = at.text + text, self.by_id[at.parent]
        return text

    def _written(self, session, request, parent, index):
        state, tag, tokens = self._states[request.parent], -1, []
        finish = Finish.EOS
        text = self._write(self.path_text(request.parent), index)
        for turn in self._turns:
            text = text.partition(turn)[0]
        for token in text.encode():
            if len(tokens) == request.max_new_tokens:
                finish = Finish.LENGTH
                break
            tokens.append(token)
            state, found, _ = self._tags.advance(state, token)
            if found in (request.stops or ()):
                finish, tag = Finish.TAG, found
                break
        if len(tokens) == request.max_new_tokens and finish is Finish.EOS:
            finish = Finish.LENGTH
        self._states[len(self.by_id)] = state
        text, numbers = bytes(tokens).decode(), (-1.0,) * len(tokens)
        seed = request.seeds[index]
        return Continuation(
            -1, request.parent, tuple(tokens), text, numbers, entropies=numbers, finish=finish, tag=tag, seed=seed
        )


class ScriptedBackend:
    """``open(draw)`` is a session of that script."""

    features = frozenset({Feature.SEEDS, Feature.TOKEN_IDS, Feature.LOGPROBS, Feature.ENTROPIES})

    def open(self, prompt):
        return ScriptedSession(prompt)


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

    def candidate(session, request, parent, index) -> Continuation:
        tags, ancestor = [], session.by_id[request.parent]
        while ancestor.id != session.root:
            tags, ancestor = [ancestor.tag, *tags], session.by_id[ancestor.parent]
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
        finish = Finish.LENGTH if cut else draft.finish
        tag = -1
        if finish is Finish.TAG:
            tag = depth if draft.tag is None else draft.tag
            if draft.closes is not None:
                tag = grammar.names.index(draft.closes)
        tokens, seed = (token,) * length, request.seeds[index]
        return Continuation(
            -1,
            request.parent,
            tokens,
            decode(tokens),
            logprobs=(draft.logprob,) * length,
            entropies=(1.0,) * length,
            finish=finish,
            tag=tag,
            seed=seed,
        )

    session = ScriptedBackend().open(candidate)
    played = Play(
        Search(session, decode, seed, max_new_tokens, calibration, grammar=grammar), requests=session.requests
    )
    played.search.on_event = played.events.append

    def scorer(spans):
        played.scored.append(list(spans))
        return wrong_scores or [scores[span.tokens[-1]] for span in spans]

    drive = Drive(session, policy(played.search, make_config(scorer=scorer)))
    assert drive.done and session.is_closed
    if drive.error:
        raise drive.error
    played.result = drive.result[0] if isinstance(drive.result, list) else drive.result
    return played
