"""The format of a trace. The reader checks files against these types, so this is its only description.

JSON has no infinities and no NaN: in a file they are the strings "inf", "-inf" and "nan". Increase ``TRACE_VERSION``
when you add a field that readers need, remove a field, or change the meaning of one.
"""

from typing import NotRequired, TypedDict

TRACE_VERSION = 7


class NodeData(TypedDict):
    """A candidate: one stage, a whole answer, or a part of one."""

    id: int  # counted from 1 in the order of drawing; 0 is the prompt, which is not in the list
    parent: int  # the node that it continues; 0: the prompt
    stage: str | None  # None: a whole answer or a part of one
    round: int  # counted from 1
    index: int  # its number among the candidates of its parent in its round, from 0
    seed: int  # the seed that it was drawn with
    turn: str  # the user's turn that asked for it, as text; empty if none did
    given: list[int]  # the token ids of that turn, from the end of its parent to the start of its own
    text: str  # its own text, tags included
    tokens: list[int]  # token ids; empty where the back end does not know them
    logprobs: list[float]  # log-prob of each token under the model, in nats; empty if not known
    sampling_logprobs: list[float]  # the same under the filtered distribution that was sampled; empty if not known
    entropies: list[float]  # entropy of the model's distribution at each token, in nats; empty if not known
    finish: str | None  # why it ended: "tag", "eos", "length" or "stopped"
    closed: bool  # whether it ended as it should: a stage with its closing tag, a whole answer with EOS
    violation: str | None  # how it left the grammar; None if it did not
    score: float | None  # None: not scored; -inf: its scorer failed
    error: str | None  # why its scorer failed; None if it did not
    notes: dict[str, float]  # numbers from its scorer, such as the scores that were combined
    kept: bool  # whether the search continued from it
    seconds: float  # from the start of the search to its last token


class EventData(TypedDict):
    """An event of a search. A policy may add events of its own kinds, of which only these fields are known."""

    event: str  # its kind; those of the search itself are the keys of ``EVENTS``
    seconds: float  # from the start of the search


class Started(EventData):
    """The search began."""

    seed: int


class Generated(EventData):
    """Candidates were drawn."""

    nodes: list[int]
    stage: NotRequired[str | None]  # the stage of the first node; absent if there are no nodes
    round: NotRequired[int]


class Scored(EventData):
    """Candidates were scored."""

    nodes: list[int]
    scores: list[float]  # one for each node
    scorer: str
    scope: str  # the text that was scored of each: "stage" or "path"


class Failed(EventData):
    """A scorer had no finite score for some candidates."""

    scorer: str
    errors: dict[str, str]  # keyed by the node's id


class Kept(EventData):
    """The candidates to continue from were chosen from a pool."""

    stage: str | None
    round: int
    pool: list[int]
    kept: list[int]
    pruned: list[int]
    cutoff: float | None  # None: scores could not fail the stage
    pass_rank: int  # counted from 1; the closed candidate of this rank had to score above the cutoff
    score: float | None  # the score of that candidate; None: too few candidates closed


class Retraced(EventData):
    """A stage failed, and the search went back."""

    stage: str  # the stage that failed
    to: str  # the stage that is drawn again
    round: int  # the round that begins
    cutoff: float | None
    score: float | None  # the score that was not above the cutoff; None: too few candidates closed, or see ``reason``
    reason: str


class BudgetSpent(EventData):
    """A limit of the budget was reached. After this, tokens are only drawn to finish an answer greedily."""

    what: str  # the name of the limit, a field of ``UsageData``
    spent: NotRequired[float]  # what was spent by then, in the units of that limit


class Accepted(EventData):
    """The search ended with these answers, the best first."""

    nodes: list[int]


EVENTS: dict[str, type] = {
    "started": Started,
    "generated": Generated,
    "scored": Scored,
    "failed": Failed,
    "kept": Kept,
    "retraced": Retraced,
    "budget_spent": BudgetSpent,
    "accepted": Accepted,
}


class GrammarData(TypedDict):
    """The arguments of ``llava_cot.stages.Grammar``, with every tag spelled out."""

    follows: dict[str, list[str]]
    start: list[str]
    max_visits: dict[str, int]
    tags: dict[str, list[str]]  # the opening and the closing tag of each stage; empty where it has none
    opened: str | None  # the stage whose opening tag the prompt has written
    turns: dict[str, str]  # for a stage the user's turn that asks for it


class ConfigData(TypedDict, total=False):
    """The settings of the policy, the fields of its configuration class. Only those that readers use are named here."""

    scorer: str  # the name of the scorer
    budget: dict[str, float] | None  # limits, in the units of ``UsageData``
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    cutoff_agreement: float | None  # the share of candidates that had to agree, in [0, 1]


class CalibrationData(TypedDict):
    """The calibration that the thresholds came from."""

    scorer: str
    data: str  # the name of the data that it was measured on


class UsageData(TypedDict):
    """The cost of a search, with the fields of ``llava_cot.core.Usage``."""

    prompt_tokens: int
    recomputed_tokens: int
    decoded_tokens: int  # tokens computed after the prompt, including drafts that were rejected
    drafted_tokens: int  # tokens computed as drafts, before they were drawn
    accepted_tokens: int  # drafts that were then drawn, by each candidate
    shared_tokens: int  # tokens that were not computed, since a candidate with the same tokens was
    generated_tokens: int
    generations: int  # candidates drawn
    image_encodings: int
    scorer_calls: int  # candidates given to a scorer
    steps: int  # forward passes that it took part in
    seconds: float


class ErrorData(TypedDict):
    """The exception that ended a failed search."""

    type: str  # the exception's class
    message: str


class TraceData(TypedDict):
    """Everything that a search did: its settings, every candidate, every decision, its answers, and its cost."""

    version: int  # TRACE_VERSION
    versions: dict[str, str]  # the versions of the libraries that ran the model, by name
    model: str  # a folder or a hub name; empty if it has neither
    question: str | None  # None: only tokens were given
    search: str  # the policy's name
    config: ConfigData
    grammar: GrammarData
    seed: int
    bos: str  # "one" or "released"
    calibration: CalibrationData | None
    prompt_tokens: int
    nodes: list[NodeData]  # parents before their children
    events: list[EventData]  # in the order in which they happened
    answer: int | None  # the last node of the answer; None: the search failed or was still running
    answers: list[int]  # the last nodes of all returned answers, the best first
    usage: UsageData
    error: ErrorData | None  # None: the search succeeded or was still running
