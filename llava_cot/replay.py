"""Replay a stored trace: force its tokens through an engine, and compare their log-probs with those of the trace."""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from llava_cot.core import Extend, Program
from llava_cot.image import Images, images_of, open_image
from llava_cot.search.drive import Drive
from llava_cot.trace import Trace
from llava_cot.trace.schema import NodeData

if TYPE_CHECKING:
    from llava_cot.generator import SwiresGenerator
    from llava_cot.question import Question

TOLERANCE = 1e-4  # nats
TOKENS_PER_PASS = 256  # the logits of so many tokens are held at once


@dataclass(frozen=True)
class Difference:
    """A token whose log-prob is not the one that the trace has. As text it is one line for a person."""

    candidate: int  # the id of its node in the trace
    stage: str | None
    round: int
    index: int  # of the token in its candidate, from 0
    token: int
    text: str  # of the token, special tokens included
    stored: float  # nats
    found: float  # nats

    @property
    def size(self) -> float:
        """The absolute difference in nats. It is inf where one of the two is NaN or an infinity of its own."""
        size = 0.0 if self.stored == self.found else abs(self.stored - self.found)
        return math.inf if math.isnan(size) else size

    def __str__(self) -> str:
        place = f"candidate #{self.candidate} ({self.stage or 'no stage'}, round {self.round})"
        token = f"token {self.index} {self.text!r} (id {self.token})"
        return f"{place}, {token}: the trace has log-prob {self.stored:.6g}, the model gives {self.found:.6g}"


@dataclass(frozen=True)
class Replay:
    """What ``replay`` found.

    Attributes:
        tokens, candidates: how many were compared.
        skipped: candidates of which the trace has no tokens or no log-probs, or of an ancestor no tokens.
        differing: how many tokens differ by more than ``tolerance``.
        differences: the first such token of each candidate that has one, in the order of drawing. So the first of them
            is where the trace and the model part.
        largest: the token that differs most.
    """

    tolerance: float  # nats
    tokens: int
    candidates: int
    skipped: int
    differing: int
    differences: tuple[Difference, ...]
    largest: Difference

    @property
    def agrees(self) -> bool:
        """Whether no log-prob differs by more than the tolerance."""
        return not self.differences

    def __str__(self) -> str:
        most = self.largest
        place = f"largest difference {most.size:.2g} at candidate #{most.candidate}, token {most.index}"
        if self.agrees:
            return f"{self.tokens} tokens of {self.candidates} candidates agree to {self.tolerance:g} ({place})"
        return (
            f"{self.differing} of {self.tokens} tokens, in {len(self.differences)} of {self.candidates} candidates, "
            f"differ by more than {self.tolerance:g} ({place})"
        )


def replay(
    generator: "SwiresGenerator",
    trace: Trace,
    image: Images = None,
    question: "Question | None" = None,
    *,
    tolerance: float = TOLERANCE,
) -> Replay:
    """Read every candidate of ``trace`` after its parent's path, and compare the log-probs of its tokens.

    The log-probs compared are the model's own, before temperature and filters. No token is drawn, so seeds do not
    matter. The generator must be as that of the search was: the same model, ``bos``, ``system``, ``grammar`` and
    ``chat_template_kwargs``.

    Args:
        image: what the question was about, as ``generator.answer`` takes it; a trace holds no images.
        question: by default that of the trace. It must be given where the search was asked a conversation, of which a
            trace holds only the last message, and for a trace of ``generate``, which holds none.
        tolerance: nats. Rounding alone differs by up to 1e-5 in float32, and by far more in bfloat16.

    Raises:
        ValueError: an argument is wrong, the trace has nothing to compare, or it can't be of this model and question.
        OutOfPages: the KV cache is too small for the trace.
    """
    check_replay(trace, image, tolerance)
    question = trace.data["question"] if question is None else question
    if question is None:
        raise ValueError("question must be given, since the trace holds none, got None")
    if generator.bos != trace.data["bos"]:
        raise ValueError(f"generator.bos must be that of the trace, {trace.data['bos']!r}, got {generator.bos!r}")
    nodes = _with_known_paths(trace)
    _check_tokens(nodes, generator.engine.view.vocab_size)
    prompt = generator.prompt([open_image(each) for each in images_of(image)], question)
    length, most = prompt["input_ids"].shape[1], generator.engine.view.max_length
    if length != trace.data["prompt_tokens"]:
        raise ValueError(
            f"the prompt must have trace.prompt_tokens={trace.data['prompt_tokens']} tokens, got {length}: model, "
            "images, question and system prompt must be those of the search"
        )
    longest = length + max(_path_lengths(nodes).values())
    if most is not None and longest > most:
        raise ValueError(f"trace must fit into max_position_embeddings={most}, got a path of {longest} tokens")
    session = generator.engine.open(prompt)
    if not generator.engine.processors.is_empty:
        raise ValueError(
            "the model's generation_config must have no logits processors, since log-probs in a trace include them"
        )
    drive = Drive(session, _force(nodes))
    try:
        generator.engine.run_until(lambda: drive.done)
    finally:
        drive.cancel()
    if drive.error is not None:
        raise drive.error
    return _compared(trace, nodes, drive.result, tolerance, generator)


def check_replay(trace: Trace, image: Images, tolerance: float) -> None:
    """Check what can be checked without a model: that there is something to compare, and an image if there was one.

    Raises:
        ValueError: naming what is wrong.
    """
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be >= 0, got {tolerance}")
    for place, node in enumerate(trace.data["nodes"]):
        if node["tokens"] and len(node["logprobs"]) not in (0, len(node["tokens"])):
            raise ValueError(
                f"trace.nodes[{place}].logprobs must be empty or have one for each of {len(node['tokens'])} tokens, "
                f"got {len(node['logprobs'])}"
            )
    if not any(node["logprobs"] for node in _with_known_paths(trace).values()):
        why = f", and its search failed: {trace.failure}" if trace.failure else ""
        count = len(trace.nodes)
        raise ValueError(f"trace must have candidates with tokens and log-probs, got none among {count}{why}")
    was_about_one = trace.data["usage"]["image_encodings"] > 0
    if was_about_one and not images_of(image):
        raise ValueError("image must be given, since the question was about one and a trace holds no images, got none")
    if images_of(image) and not was_about_one:
        raise ValueError("image must not be given, since the question of the trace was about none, got one")


def _with_known_paths(trace: Trace) -> dict[int, NodeData]:
    """The candidates by id whose tokens are known, and those of all their ancestors."""
    known: dict[int, NodeData] = {}
    for node in trace.data["nodes"]:
        if node["tokens"] and (node["parent"] in known or not node["parent"]):
            known[node["id"]] = node
    return known


def _check_tokens(nodes: Mapping[int, NodeData], vocab_size: int) -> None:
    for node in nodes.values():
        for name, tokens in (("given", node["given"]), ("tokens", node["tokens"])):
            unknown = [token for token in tokens if not 0 <= token < vocab_size]
            if unknown:
                raise ValueError(
                    f"{name} of candidate #{node['id']} must be in [0, vocab_size={vocab_size}), got {unknown[0]}: is "
                    "this the model of the trace?"
                )


def _path_lengths(nodes: Mapping[int, NodeData]) -> dict[int, int]:
    """How many tokens there are from the end of the prompt to the end of each candidate."""
    lengths = {0: 0}
    for node in nodes.values():
        lengths[node["id"]] = lengths[node["parent"]] + len(node["given"]) + len(node["tokens"])
    return lengths


def _force(nodes: Mapping[int, NodeData]) -> Program[dict[int, list[float]]]:
    """Append the user's turn and the tokens of each candidate to its parent's. Returns the log-probs by candidate."""
    ends, found = {0: 0}, dict[int, list[float]]()  # the continuation at the end of each candidate
    for id, node in nodes.items():
        end, tokens, logprobs = ends[node["parent"]], (*node["given"], *node["tokens"]), list[float]()
        for start in range(0, len(tokens), TOKENS_PER_PASS):
            ((read,),) = yield [Extend(end, tokens[start : start + TOKENS_PER_PASS])]
            end = read.id
            logprobs += read.logprobs
        ends[id], found[id] = end, logprobs[len(node["given"]) :]
    return found


def _compared(
    trace: Trace,
    nodes: Mapping[int, NodeData],
    found: Mapping[int, list[float]],
    tolerance: float,
    generator: "SwiresGenerator",
) -> Replay:
    compared = [node for node in nodes.values() if node["logprobs"]]
    pairs = [pair for node in compared for pair in _pairs(node, found[node["id"]], generator)]
    beyond = [pair for pair in pairs if pair.size > tolerance]
    firsts = {pair.candidate: pair for pair in reversed(beyond)}
    return Replay(
        tolerance=tolerance,
        tokens=len(pairs),
        candidates=len(compared),
        skipped=sum(bool(node["text"] or node["tokens"]) for node in trace.data["nodes"]) - len(compared),
        differing=len(beyond),
        differences=tuple(reversed(firsts.values())),
        largest=max(pairs, key=lambda pair: pair.size),
    )


def _pairs(node: NodeData, found: list[float], generator: "SwiresGenerator") -> Iterator[Difference]:
    for index, (token, stored, own) in enumerate(zip(node["tokens"], node["logprobs"], found, strict=True)):
        text = generator.processor.tokenizer.decode([token])
        yield Difference(node["id"], node["stage"], node["round"], index, token, text, stored, own)
