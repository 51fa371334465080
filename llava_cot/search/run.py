"""Runs of a search. When the budget is spent, a run ends with the best answer so far, or finishes the best prefix."""

import reprlib
from collections.abc import Generator
from statistics import fmean
from typing import Any

from llava_cot.core import Continuation, Expand, Finish, Limit, Program, SamplingParams
from llava_cot.search.drive import Drive
from llava_cot.search.plan import Plan, Policy
from llava_cot.search.search import BudgetSpent, Search
from llava_cot.search.tree import Node, candidate_seed


class SearchRun(Drive):
    """A search that runs on a session. Its ``result`` is the list of nodes that the policy returned, the best first."""

    def __init__(self, search: Search, plan: Plan) -> None:
        self.search, self.plan = search, plan
        super().__init__(search.session, run(search, plan.policy))

    def _end(self) -> None:
        super()._end()
        if self.done:  # nothing looks at the image any more, and it may be large
            self.search.forget()


def run(search: Search, policy: Policy) -> Program[list[Node]]:
    """Run ``policy`` until it returns or its budget is spent. Returns the answers, the best first.

    Raises:
        TypeError: the policy is no generator function, or does not return nodes that it has drawn.
    """
    search.note("started", seed=search.seed)
    try:
        program = policy(search)
        if not isinstance(program, Generator):
            got = reprlib.repr(program)
            raise TypeError(f"the policy must be a generator function that yields requests, got one that returns {got}")
        result = yield from program
    except BudgetSpent as spent:
        search.note("budget_spent", what=str(spent), spent=getattr(search.usage, str(spent)))
        result = yield from finish(search)
    nodes = _answers(search, result)
    search.note("accepted", nodes=[node.id for node in nodes])
    return nodes


def _answers(search: Search, result: Any) -> list[Node]:
    nodes = list(result) if isinstance(result, (list, tuple)) else [result]
    drawn = {id(node) for node in search.nodes[1:]}
    wrong = [node for node in nodes if id(node) not in drawn]
    if wrong or not nodes:
        got = "an empty list" if not wrong else "the root" if wrong[0] is search.root else type(wrong[0]).__name__
        raise TypeError(f"the policy must return a node that it has drawn, or a list of such nodes, got {got}")
    return nodes


def finish(search: Search) -> Program[Node]:
    """Return the whole answer with the best score. Without one, finish the best prefix with what the reserve allows.

    The best prefix has the most closed stages (a candidate that was stopped in the middle of one counts half), then the
    best score, or the best mean log-prob where there is no score. The user's turns that are left are asked, unless the
    spent limit is that of prompt tokens, to which they count.
    """
    drawn = search.nodes[1:]
    answers = [node for node in drawn if node.closed and _is_answer(search, node)]
    if answers:
        best = max(answers, key=lambda node: (node.score is not None, *_promise(node)))
    else:
        prefixes = [n for n in drawn if n.closed or n.finish is Finish.STOPPED]
        prefix = max(prefixes, key=lambda node: (_progress(node), *_promise(node)), default=search.root)
        best = yield from _continue(search, prefix)
    for node in best.path():
        node.kept = True
        search.final(node)
    return best


def _is_answer(search: Search, node: Node) -> bool:
    return not search.allowed(node) or (node.finish is Finish.EOS and search.next_turn(node) is None)


def _progress(node: Node) -> float:
    return sum(1.0 if ancestor.closed else 0.5 for ancestor in node.path())


def _promise(node: Node) -> tuple[float, int]:
    likely = fmean(node.logprobs) if node.logprobs else 0.0
    return node.score if node.score is not None else likely, -node.id


def _continue(search: Search, prefix: Node) -> Program[Node]:
    budget = search.budget
    assert budget is not None
    node, limit = prefix, budget.limit(finishing=True)
    while True:
        left = search.tokens_left(node)
        if budget.generated_tokens is not None:
            left = min(left, budget.generated_tokens - search.usage.generated_tokens)
        turn = search.next_turn(node)
        is_over = node is not prefix and turn is None
        is_spent = limit.reached(search.usage) or Limit(prompt_tokens=budget.prompt_tokens).reached(search.usage)
        if is_over or left < 1 or (turn is not None and is_spent):
            break
        source = yield from search.ask(node)
        greedy, seed = SamplingParams(temperature=0.0), candidate_seed(search.seed, "finish", 1, node.id, 0)
        ((drawn,),) = yield [Expand(source, (seed,), greedy, left, frozenset(), limit=limit)]
        node = search.node(node, turn, prefix.round or 1, 0, drawn, drawn.finish is Finish.EOS)
        search.note("generated", stage=turn, round=node.round, nodes=[node.id])
    return node if node.parent else search.node(node, None, 1, 0, Continuation(-1, node.continuation.id), False)
