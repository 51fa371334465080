"""What a trace holds. The reader checks files against these types, so they are the one description of the format.

JSON has no infinities: in a file they are the strings "inf" and "-inf". Whoever adds a field that readers need, removes
one or changes what one means raises ``TRACE_VERSION``.
"""

from typing import NotRequired, TypedDict

TRACE_VERSION = 4


class NodeData(TypedDict):
    """A candidate: one stage, a whole answer, or a part of one."""

    id: int  # from 1 in the order of drawing; 0 is the prompt, which is not in the list
    parent: int  # the node that it was drawn after; 0: the prompt
    stage: str | None  # None: a whole answer or a part of one
    round: int  # from 1
    index: int  # among the candidates of its parent in its round
    seed: int  # that it was drawn with
    text: str  # what it added, tags included
    tokens: list[int]  # token ids; empty where the back end does not know them
    logprobs: list[float]  # of each token under the model, in nats; empty if not known
    sampling_logprobs: list[float]  # under the filtered distribution that was drawn from, in nats; empty if not known
    entropies: list[float]  # of the model's distribution at each token, in nats; empty if not known
    finish: str | None  # why it ended: "tag", "eos", "length" or "stopped"
    closed: bool  # it ended as it should: with its own closing tag, or a whole answer with EOS
    violation: str | None  # how it left the grammar
    score: float | None  # None: it was not scored; -inf: its scorer failed
    error: str | None  # why it has no score of its own
    notes: dict[str, float]  # what its scorer has to tell, such as the scores that it combined
    kept: bool  # the search went on with it
    seconds: float  # from the start of the search to its last token


class EventData(TypedDict):
    """Something that happened. A policy may note events of its own, of which only this much is known."""

    event: str  # its kind; the search's own are the keys of ``EVENTS``
    seconds: float  # from the start of the search


class Started(EventData):
    seed: int


class Generated(EventData):
    """Candidates were drawn."""

    nodes: list[int]
    stage: NotRequired[str | None]  # of the first node; absent if there are none
    round: NotRequired[int]


class Scored(EventData):
    """Candidates were scored."""

    nodes: list[int]
    scores: list[float]  # one for each node
    scorer: str
    scope: str  # what was scored of each: "stage" or "path"


class Failed(EventData):
    """A scorer had no finite score for some candidates."""

    scorer: str
    errors: dict[str, str]  # by the node's id


class Kept(EventData):
    """A pool of candidates was cut down."""

    stage: str | None
    round: int
    pool: list[int]
    kept: list[int]
    pruned: list[int]
    cutoff: float | None  # None: the stage could not fail by its scores
    pass_rank: int  # from 1; the closed candidate of this rank had to score above the cutoff
    score: float | None  # of that candidate; None: fewer candidates closed


class Retraced(EventData):
    """A stage failed, and the search went back."""

    stage: str  # that failed
    to: str  # that is drawn again
    round: int  # that begins
    cutoff: float | None
    score: float | None  # that was not above the cutoff; None: too few candidates closed, or another reason
    reason: str


class BudgetSpent(EventData):
    """A limit of the budget was reached. What is generated after this finishes an answer greedily."""

    what: str  # the limit's name in ``UsageData``
    spent: NotRequired[float]  # in the units of that limit


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
    tags: dict[str, list[str]]


class ConfigData(TypedDict, total=False):
    """The settings of the policy, as its configuration class has them. Those that readers use are named here."""

    scorer: str  # by name
    budget: dict[str, float] | None  # its limits, in the units of ``UsageData``
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    cutoff_agreement: float | None  # the share of the candidates that had to agree, in [0, 1]


class CalibrationData(TypedDict):
    """Which calibration the thresholds came from."""

    scorer: str
    data: str  # the name of the data that it was measured on


class UsageData(TypedDict):
    """What a search cost, as in ``llava_cot.core.Usage``."""

    prompt_tokens: int
    recomputed_tokens: int
    decoded_tokens: int
    generated_tokens: int
    generations: int  # candidates drawn
    image_encodings: int
    scorer_calls: int  # candidates given to a scorer
    steps: int  # forward passes
    seconds: float


class ErrorData(TypedDict):
    """What ended a search that failed."""

    type: str  # the exception's class
    message: str


class TraceData(TypedDict):
    """Everything a search did: its settings, every candidate, every decision, what came of it, and what it cost."""

    version: int  # TRACE_VERSION
    versions: dict[str, str]  # of the libraries that ran the model, by name
    model: str  # a folder or name, empty if it has none
    question: str | None  # None: the search was given tokens
    search: str  # the policy's name
    config: ConfigData
    grammar: GrammarData
    seed: int
    bos: str  # "one" or "released"
    calibration: CalibrationData | None
    prompt_tokens: int
    nodes: list[NodeData]  # parents before their children
    events: list[EventData]  # in the order in which they happened
    answer: int | None  # the node that ends the answer; None exactly if the search failed
    answers: list[int]  # of all answers that were returned, the best first
    usage: UsageData
    error: ErrorData | None  # what ended a search that failed
