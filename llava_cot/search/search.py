"""The object that a policy works with: it grows the tree, scores nodes and reports what happened."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from llava_cot.core import (
    Continuation,
    Expand,
    Extend,
    Feature,
    Finish,
    Program,
    Request,
    Result,
    SamplingParams,
    Session,
    Usage,
    check_features,
    check_kind,
    requests_of,
    whole_number,
)
from llava_cot.scoring import Calibration, Scorer, Span, resolve_scorer
from llava_cot.scoring.scorer import TurnTokens, WrongNumber, ask, is_groupwise, name_of, needs_of
from llava_cot.search.budget import Budget
from llava_cot.search.events import Candidate, Candidates, Event, Retrace, StageFinal
from llava_cot.search.tree import Node, candidate_seed, stages_of
from llava_cot.stages import LLAVA_COT, Grammar

if TYPE_CHECKING:
    from PIL.Image import Image

Scope = Literal["stage", "path"]
NEXT = "next"  # a value for ``stage`` in ``expand``: whichever stage the grammar allows after the parent
SENTENCE_ENDS = (". ", "? ", "! ", ".\n", "?\n", "!\n")  # the engine's tags that follow those of the grammar


class BudgetSpent(Exception):
    """Raised when a policy asks for more than its budget allows. Its text is the name of the limit."""


@dataclass(eq=False)
class Search:
    """One search of one question. A policy is ``def policy(search) -> Generator[..., Node]``:

    >>> def best_of_two(search):
    ...     nodes = yield from search.expand([search.root], 2, None, params=SamplingParams(temperature=0.6))
    ...     yield from search.score(nodes, confidence)
    ...     return search.best(nodes)
    """

    session: Session
    decode: Callable[[Sequence[int]], str]  # token ids to text, for answers that a policy puts together itself
    seed: int = 0
    max_new_tokens: int = 2048  # of one path, over all of its stages
    calibration: Calibration | None = None
    on_event: Callable[[Event], None] = lambda event: None
    eos_token_ids: frozenset[int] = frozenset()
    grammar: Grammar = LLAVA_COT  # its stops are the engine's first tags
    budget: Budget | None = None
    question: str | None = None
    load_images: "Callable[[], Sequence[Image]]" = tuple
    turn_tokens: TurnTokens | None = None  # needed where the grammar has turns
    features: frozenset[Feature] = frozenset(Feature)  # of the back end
    nodes: list[Node] = field(default_factory=list)
    log: list[dict[str, Any]] = field(default_factory=list)
    retraces: list[Retrace] = field(default_factory=list)
    root: Node = field(init=False)
    _scores: dict[tuple, tuple[float, str | None, dict[str, float]]] = field(default_factory=dict)
    _scorers: dict[int, Scorer] = field(default_factory=dict)
    _images: "Sequence[Image] | None" = None
    _memo: dict[Any, Any] = field(default_factory=dict)
    _asked: dict[tuple[int, str], Continuation] = field(default_factory=dict)  # the turns after a node, by stage
    _turns: dict[int, tuple[str, tuple[int, ...]]] = field(default_factory=dict)  # their text and tokens, by id

    def __post_init__(self) -> None:
        if self.grammar.turns and self.turn_tokens is None:
            raise ValueError("turn_tokens must be given for a grammar with turns, got None")
        self.root = Node(0, None, None, 0, 0, Continuation(self.session.root, -1))
        self.nodes.append(self.root)

    @property
    def usage(self) -> Usage:
        """What the search has cost so far."""
        return self.session.usage

    @property
    def images(self) -> "Sequence[Image]":
        """The images in RGB. They are opened when they are asked for, and kept until a scorer has returned."""
        if self._images is None:
            self._images = self.load_images()
        return self._images

    def forget(self) -> None:
        """Keep neither the images, nor what they would be opened from, nor what scorers have kept."""
        self._images, self.load_images = None, tuple
        self._memo.clear()

    def can_grow(self, node: Node) -> bool:
        """Whether another stage may come after ``node``."""
        return bool(self.allowed(node)) and self.can_continue(node)

    def allowed(self, node: Node) -> tuple[str, ...]:
        """The stages that may come after ``node``: one if the prompt or a heading has opened it."""
        if node.opens is not None:
            return (node.opens,)
        return self.grammar.allowed(stages_of(node)) if node.parent else self.grammar.first()

    def can_continue(self, node: Node) -> bool:
        """Whether any token may come after ``node``, in the same reply or in the next one."""
        return self.tokens_left(node) > 0 and (node.finish is not Finish.EOS or self.next_turn(node) is not None)

    def next_turn(self, node: Node) -> str | None:
        """The stage that the user's turn asks for after ``node``, if its reply has ended and there is such a stage."""
        if not self.grammar.turns or not _has_ended(node):
            return None
        stages = stages_of(node)
        if len(stages) < len(node.path()):  # a node without a stage may hold several
            stages = [part.name for part in self.grammar.parts(node.path_text())]
        return self.grammar.next_turn(stages)

    def expand(
        self,
        parents: Sequence[Node],
        n: int,
        stage: str | None,
        *,
        params: SamplingParams,
        round: int = 1,
        max_stage_tokens: int | None = None,
        first_index: int = 0,
    ) -> Program[list[Node]]:
        """Draw ``n`` candidates of ``stage`` from each parent. Each ends with a closing stage tag, EOS or the limit.

        ``stage`` None draws whole answers, which tags do not end; ``NEXT`` is whichever stage the grammar allows after
        the parent. Returns the new nodes in (parent, index) order.

        If the user's turn asks for the stage, the model is given that first, once for each parent. A whole answer of a
        grammar with turns is a node for each stage, of which the last one is returned. A reply that is cut by
        ``max_stage_tokens`` ends where the next turn begins.

        Raises:
            BudgetSpent: the budget is spent. What was drawn until then is in the tree.
            ValueError, TypeError: naming the argument that is wrong.
        """
        n = whole_number("n", n, 1)
        if stage not in (None, NEXT, *self.grammar.names):
            raise ValueError(f"stage must be one of {list(self.grammar.names)}, NEXT or None, got {stage!r}")
        if max_stage_tokens is not None:
            whole_number("max_stage_tokens", max_stage_tokens, 1)
        _check_nodes("parents", parents)
        if stage is None and self.grammar.turns:
            return (yield from self._whole(parents, n, params, round, first_index))
        allowed = [self._allowed(parent, stage) for parent in parents]
        limits = [min(self.tokens_left(parent), max_stage_tokens or self.max_new_tokens) for parent in parents]
        places = [
            ("|".join(names), round, parent.id, first_index + index)
            for parent, names in zip(parents, allowed)
            for index in range(n)
        ]
        seeds = [candidate_seed(self.seed, *place) for place in places]
        sources = yield from self._ask(parents, [self._turn_among(*asked) for asked in zip(parents, allowed)])
        requests = [
            Expand(source, tuple(seeds[at * n : at * n + n]), params, limit, self._stops(parent, names))
            for at, (parent, source, limit, names) in enumerate(zip(parents, sources, limits, allowed))
        ]
        replies = yield from self._draw(requests)
        nodes = [
            self._stage_node(parent, names, round, first_index + index, continuation)
            for parent, names, drawn in zip(parents, allowed, replies)
            for index, continuation in enumerate(drawn)
        ]
        self._drawn(nodes)
        return nodes

    def expand_sentence(
        self, parents: Sequence[Node], n: int, *, params: SamplingParams, round: int
    ) -> Program[list[Node]]:
        """Draw ``n`` pieces from each parent. Each ends with a sentence or a stage, at EOS or at the limit.

        The stage of a piece is None. A piece is closed unless the limit cut it. A token that reaches into the next
        sentence is not part of it.

        Raises:
            BudgetSpent, ValueError, TypeError: see ``expand``.
        """
        n = whole_number("n", n, 1)
        _check_nodes("parents", parents)
        stages = len(self.grammar.stops)
        trims = frozenset(range(stages, len(stop_tags(self.grammar))))
        sources = yield from self._ask(parents, [*map(self.next_turn, parents)])
        requests = [
            Expand(
                source,
                tuple(candidate_seed(self.seed, "", round, parent.id, index) for index in range(n)),
                params,
                self.tokens_left(parent),
                frozenset(range(stages)),
                trims,
            )
            for parent, source in zip(parents, sources)
        ]
        replies = yield from self._draw(requests)
        nodes = [
            self.node(parent, None, round, index, drawn, drawn.finish in (Finish.TAG, Finish.EOS))
            for parent, reply in zip(parents, replies)
            for index, drawn in enumerate(reply)
        ]
        self._drawn(nodes)
        return nodes

    def node(
        self, parent: Node, stage: str | None, round: int, index: int, continuation: Continuation, closed: bool
    ) -> Node:
        """Put a finished continuation into the tree."""
        node = Node(len(self.nodes), parent, stage, round, index, continuation, closed=closed)
        node.seconds = self.usage.seconds
        node.turn, node.given = self._turns.get(continuation.parent, ("", ()))
        self.nodes.append(node)
        return node

    def ask(self, node: Node) -> Program[int]:
        """Ask the user's turn that comes after ``node``, if one does, even if the budget is spent.

        Returns the id of the continuation that may be continued then.
        """
        (source,) = yield from self._ask([node], [self.next_turn(node)], is_bounded=False)
        return source

    def forge(self, tokens: Sequence[int], logprobs: Sequence[float], finish: Finish) -> Continuation:
        """Make a whole answer that the policy put together itself. Nothing can grow from it."""
        text = self.decode(list(tokens))
        return Continuation(-1, self.session.root, tuple(tokens), text, tuple(logprobs), finish=finish)

    def add(self, whole: Continuation, score: float) -> Node:
        """Put a scored whole answer into the tree, as a node under the root."""
        node = self.node(self.root, None, 1, len(self.nodes) - 1, whole, whole.finish is Finish.EOS)
        node.score = score
        return node

    def tokens_left(self, node: Node) -> int:
        """How many more tokens the path of ``node`` may have."""
        return self.max_new_tokens - sum(len(ancestor.tokens) for ancestor in node.path())

    def spent(self) -> str | None:
        """The name of a limit of the budget that is reached, apart from the reserve for finishing, or None."""
        return self.budget.spent(self.usage) if self.budget else None

    def score(self, nodes: Sequence[Node], scorer: str | Scorer, scope: Scope = "stage") -> Program[None]:
        """Give every node the score of its own text, or with the scope ``"path"`` of its whole path.

        One path of tokens has one score: equal candidates are scored once, except by a ``groupwise`` scorer, whose
        scores hold within ``nodes`` alone. A candidate whose score is not finite, or for which the scorer raises,
        ranks with -inf and keeps the error. A scorer that raises on several candidates is asked again for each alone.

        Raises:
            BudgetSpent: too few scorer calls are left for all of them.
            Exception: what the scorer raised, if it raised for every one of ``nodes``.
            ValueError: the scorer does not return one number per span, its name or the scope is unknown, or it needs
                what the back end lacks.
        """
        scorer = resolve_scorer(scorer)
        check_features(f"scorer={name_of(scorer)!r}", needs_of(scorer), self.features)
        if scope not in ("stage", "path"):
            raise ValueError(f"scope must be 'stage' or 'path', got {scope!r}")
        _check_nodes("nodes", nodes)
        self._scorers[id(scorer)] = scorer  # while it lives, no other object has its id
        keys = [(id(scorer), scope, node.read_tokens()) for node in nodes]
        first: dict[tuple, Node] = {}
        for key, node in zip(keys, nodes):
            first.setdefault(key, node)  # equal candidates differ in the last bits of their log-probs, by batch row
        asked = keys if is_groupwise(scorer) else [key for key in first if key not in self._scores]
        limit = self.budget.scorer_calls if self.budget else None
        if limit is not None and self.usage.scorer_calls + len(asked) > limit:
            raise BudgetSpent("scorer_calls")
        self.usage.scorer_calls += len(asked)
        spans = [self._span(first[key], scope) for key in asked]
        scores = (yield from self._evaluate(scorer, spans)) if spans else []
        self._images = None
        for key, span, score in reversed([*zip(asked, spans, scores)]):  # of equal paths, the first one's counts
            if isinstance(score, Exception):
                self._scores[key] = -math.inf, repr(score), span.notes
            elif not _is_finite(score):
                self._scores[key] = -math.inf, f"the score is {score}", span.notes
            else:
                self._scores[key] = float(score), None, span.notes
        for key, node in zip(keys, nodes):
            node.score, node.error, node.notes = self._scores[key]
        ids, errors = [node.id for node in nodes], {str(node.id): node.error for node in nodes if node.error}
        self.note("scored", scorer=name_of(scorer), scope=scope, nodes=ids, scores=[node.score for node in nodes])
        if errors:
            self.note("failed", scorer=name_of(scorer), errors=errors)
        raised = [score for score in scores if isinstance(score, Exception)]
        if raised and all(node.error for node in nodes):
            raised[0].add_note(f"the scorer raised for every candidate: {ids}")
            raise raised[0]

    def best(self, nodes: Sequence[Node], n: int = 1) -> list[Node]:
        """The best ``n`` nodes with different tokens, the best first. There may be fewer."""
        distinct = {node.read_tokens(): node for node in reversed(sorted(nodes, key=Node.rank))}
        return sorted(distinct.values(), key=Node.rank)[:n]

    def keep(
        self,
        nodes: Sequence[Node],
        kept: Sequence[Node],
        *,
        pool: Sequence[Node] | None = None,
        cutoff: float | None = None,
        pass_rank: int = 1,
    ) -> None:
        """Note which of the just sampled ``nodes`` and of older ones the search continues from.

        ``pool`` is what they were chosen from, by default ``nodes``. The pool passes if the score of
        its ``pass_rank``-th best closed candidate is above ``cutoff``.
        """
        for node in kept:
            node.kept = True
        pool = nodes if pool is None else pool
        self.note(
            "kept",
            stage=nodes[0].stage,
            round=nodes[0].round,
            pool=[node.id for node in pool],
            kept=[node.id for node in kept],
            pruned=[node.id for node in pool if node not in kept],
            cutoff=cutoff,
            pass_rank=pass_rank,
            score=ranked_score(pool, pass_rank),
        )
        shown = [Candidate(n.id, n.parent.id, n.text, n.score, n.closed, n in kept) for n in nodes]  # type: ignore
        self.on_event(Candidates(nodes[0].stage, nodes[0].round, tuple(shown)))

    def retrace(
        self,
        stage: str,
        to: str,
        round: int,
        *,
        cutoff: float | None = None,
        score: float | None = None,
        reason: str | None = None,
    ) -> None:
        """Note that ``stage`` failed and that round ``round`` samples ``to`` again.

        Without a ``reason``, ``score`` was not above ``cutoff``, or was None because too few candidates closed.
        """
        self.retraces.append(Retrace(stage, to, round, cutoff, score))
        reason = reason or ("too few candidates closed" if score is None else "not above the cutoff")
        self.note("retraced", stage=stage, to=to, round=round, cutoff=cutoff, score=score, reason=reason)
        self.on_event(self.retraces[-1])

    def final(self, node: Node) -> None:
        """Note that no retrace can take ``node`` back any more."""
        self.on_event(StageFinal(node.stage, node.text))

    def note(self, event: str, **facts: Any) -> None:
        """Write an event into the trace's log."""
        self.log.append({"event": event, "seconds": self.usage.seconds, **facts})

    def to_dict(self) -> dict[str, Any]:
        """The search as the trace stores it."""
        return {"nodes": [node.to_dict() for node in self.nodes[1:]], "events": self.log}

    def _whole(
        self, parents: Sequence[Node], n: int, params: SamplingParams, round: int, first_index: int
    ) -> Program[list[Node]]:
        """Draw whole answers of a grammar with turns, stage by stage, and return their last nodes."""
        nodes = yield from self.expand(parents, n, NEXT, params=params, round=round, first_index=first_index)
        while growing := [node for node in nodes if self.can_grow(node)]:
            for node in growing:
                node.kept = True
            longer = dict(zip(growing, (yield from self.expand(growing, 1, NEXT, params=params, round=round))))
            nodes = [longer.get(node, node) for node in nodes]
        return nodes

    def _turn_among(self, parent: Node, stages: Sequence[str]) -> str | None:
        """Which of ``stages``, one of which is drawn after ``parent``, the user's turn asks for, if any."""
        return next((name for name in stages if name in self.grammar.turns), None) if _has_ended(parent) else None

    def _ask(
        self, parents: Sequence[Node], stages: Sequence[str | None], *, is_bounded: bool = True
    ) -> Program[list[int]]:
        """Give the model the user's turns for ``stages``, one for each of ``parents``. Where the stage is None there is
        no turn. Returns the ids of what candidates are drawn from. A turn that was asked before is not asked again."""
        places = [(parent, stage) for parent, stage in zip(parents, stages) if stage is not None]
        new = {(node.id, stage): node for node, stage in places if (node.id, stage) not in self._asked}
        if new:
            assert self.turn_tokens is not None
            turns = self.grammar.turns
            requests = [
                Extend(node.continuation.id, tuple(self.turn_tokens(turns[stage], node.tokens)))
                for (_, stage), node in new.items()
            ]
            replies = (yield from self._draw(requests)) if is_bounded else (yield requests)
            for place, (given,) in zip(new, replies):
                self._asked[place] = given
                self._turns[given.id] = turns[place[1]], given.tokens
        return [
            parent.continuation.id if stage is None else self._asked[parent.id, stage].id
            for parent, stage in zip(parents, stages)
        ]

    def _draw(self, requests: Sequence[Request]) -> Program[list[list[Any]]]:
        if spent := self.spent():
            raise BudgetSpent(spent)
        return (yield self._bounded(requests))

    def _bounded(self, requests: Sequence[Request]) -> list[Request]:
        """Give ``requests`` that draw tokens the limit at which the budget is spent."""
        if self.budget is None:
            return requests_of(requests)
        limit = self.budget.limit()
        return [replace(request, limit=limit) if isinstance(request, Expand) else request for request in requests]

    def _drawn(self, nodes: list[Node]) -> None:
        places = {"stage": nodes[0].stage, "round": nodes[0].round} if nodes else {}
        self.note("generated", **places, nodes=[node.id for node in nodes])
        if any(node.finish is Finish.STOPPED for node in nodes):
            raise BudgetSpent(self.spent())

    def _allowed(self, parent: Node, stage: str | None) -> tuple[str, ...]:
        return self.allowed(parent) if stage is NEXT else () if stage is None else (stage,)

    def _stops(self, parent: Node, allowed: Sequence[str]) -> frozenset[int]:
        """The numbers of the tags that end a candidate of the stages ``allowed``. Their own headings come before it."""
        own = () if parent.opens is not None or (parent.parent is None and self.grammar.opened) else allowed
        stops = self.grammar.stops if allowed else ()
        return frozenset(number for number, stop in enumerate(stops) if stop.opens is None or stop.opens not in own)

    def _stage_node(
        self, parent: Node, allowed: tuple[str, ...], round: int, index: int, continuation: Continuation
    ) -> Node:
        """Put a candidate of one of the stages ``allowed`` into the tree, or with none allowed a whole answer."""
        finish = continuation.finish
        if not allowed:
            return self.node(parent, None, round, index, continuation, finish is Finish.EOS)
        stop = self.grammar.stops[continuation.tag] if continuation.tag >= 0 else None
        written = None
        if stop is not None:
            written = self.grammar.ended_by(stop, stages_of(parent), allowed)
        elif finish is Finish.EOS:
            written = self.grammar.ended_by_eos(allowed)
        if written and not (any(self.grammar.tag_pair(written)) or self.grammar.body(continuation.text, written)):
            written = None  # without tags and without a text there is no stage
        node = self.node(parent, written or allowed[0], round, index, continuation, written is not None)
        if written is not None:
            node.opens = stop.opens if stop else None
        elif finish is not Finish.STOPPED:
            got = stop.text.strip() or repr(stop.text) if stop else f"the end ({finish})"
            node.violation = self.grammar.expected(stages_of(parent), got)
        return node

    def _evaluate(self, scorer: Scorer, spans: list[Span]) -> Program[list[float | Exception]]:
        """The score of each span, or what the scorer raised for it."""
        try:
            return [*(yield from self._guard(ask(scorer, spans)))]
        except (BudgetSpent, WrongNumber):
            raise
        except Exception as error:
            if len(spans) == 1 or is_groupwise(scorer):
                return [error for _ in spans]
            results: list[float | Exception] = []
            for span in spans:
                results += yield from self._evaluate(scorer, [span])
            return results

    def _guard(self, program: Program[Result]) -> Program[Result]:
        """Run the requests of a scorer within the budget."""
        reply: Any = None
        failure: Exception | None = None
        while True:
            try:
                requests = program.throw(failure) if failure else program.send(reply)
            except StopIteration as stop:
                return stop.value
            spent = self.spent()
            if spent and any(_costs(request, spent) for request in requests):
                program.close()
                raise BudgetSpent(spent)
            reply = failure = None
            try:
                reply = yield self._bounded(requests)
            except Exception as error:
                failure = error

    def _span(self, node: Node, scope: Scope) -> Span:
        nodes = node.path() if scope == "path" else [node]
        parts = [node.continuation for node in nodes]
        return Span(
            text=node.path_text() if scope == "path" else node.text,
            tokens=[token for part in parts for token in part.tokens],
            logprobs=[logprob for part in parts for logprob in part.logprobs],
            entropies=[entropy for part in parts for entropy in part.entropies],
            certainties=[certainty for part in parts for certainty in part.certainties],
            stage=node.stage if scope == "stage" else None,
            path_text=node.path_text(),
            closed=node.closed,
            question=self.question,
            load_images=lambda: self.images,
            grammar=self.grammar,
            id=node.continuation.id,
            root=self.session.root,
            tokens_left=self.tokens_left(node),
            memo=self._memo,
            turn_tokens=self.turn_tokens,
        )


def stop_tags(grammar: Grammar) -> list[str]:
    """Return the tags that an engine must find in sampled tokens: those that end a stage, then those of sentences."""
    stops = [stop.text for stop in grammar.stops]
    return [*stops, *(end for end in SENTENCE_ENDS if end not in stops)]


def _has_ended(node: Node) -> bool:
    """Whether the reply that ``node`` belongs to has ended: with EOS, or as a stage that its own limit has cut."""
    return node.finish is Finish.EOS or (node.stage is not None and node.finish is not Finish.STOPPED)


def _is_finite(score: Any) -> bool:
    try:
        return math.isfinite(score)
    except OverflowError:  # an integer beyond all floats
        return False
    except TypeError:
        raise WrongNumber(f"scorer must return numbers, got {score!r}") from None


def _check_nodes(name: str, nodes: Any) -> None:
    check_kind(name, nodes, Sequence, "a list of nodes")
    for node in nodes:
        check_kind(name, node, Node, "a list of nodes")


def _costs(request: Request, what: str) -> bool:
    """Whether answering ``request`` adds to the limit ``what``. Scoring on the host is never refused."""
    return isinstance(request, Expand) or (isinstance(request, Extend) and what in ("prompt_tokens", "seconds"))


def ranked_score(pool: Sequence[Node], rank: int) -> float | None:
    """The ``rank``-th best score of the closed candidates, or None if fewer have one."""
    scores = sorted((node.score for node in pool if node.closed and node.score is not None), reverse=True)
    return scores[rank - 1] if len(scores) >= rank else None
