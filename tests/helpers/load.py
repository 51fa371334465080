"""Many clients of one server: those that wait for their answers, those that go away, and those that are hostile."""

import asyncio
import json
import random
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field

import httpx

from helpers.hostile import BODIES, CHAT, GOOD, IMAGES, WRONG, asked, error_of
from helpers.serving import DEADLINE, messages_of, world

SEARCHES = (
    "greedy",
    "sample",
    "best_of_n",
    "majority",
    "token_beam",
    "sentence_beam",
    "stage_beam",
    "swires",
    "swires:published",
)
SEEDS = 2  # few, so that one call of ``answer_batch`` answers the twins of many clients
MAX_NEW_TOKENS = 256
JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Ask:
    """An honest request."""

    question: int  # of the world
    search: str
    seed: int
    stream: bool

    def body(self):
        extra = {"stream_options": {"include_usage": True}} if self.stream else {"return_token_ids": True}
        fields = {
            "model": f"tiny:{self.search}",
            "messages": messages_of(world(self.question)),
            "seed": self.seed,
            "stream": self.stream,
            "max_completion_tokens": MAX_NEW_TOKENS,
        }
        return json.dumps({**fields, **extra}).encode()


@dataclass(frozen=True)
class Said:
    """What a reply says."""

    content: str
    reasoning: str
    finish_reason: str
    drawn: int  # tokens, those of discarded candidates included
    stages: dict[str, str]
    search: dict


@dataclass
class Outcome:
    """What became of the clients of one load."""

    replies: dict[int, httpx.Response] = field(default_factory=dict)  # by the place of their request
    gone: int = 0
    refused: Counter = field(default_factory=Counter)  # hostile requests, by status
    waited: int = 0  # replies that told a client to come again


def asks(number, seed=0, searches=SEARCHES):
    """Honest requests with mixed searches, each half of them as a stream."""
    draw = random.Random(seed)
    return [Ask(at, searches[at % len(searches)], draw.randrange(SEEDS), draw.random() < 0.5) for at in range(number)]


def twins(generator, requests):
    """What each of ``requests`` is answered when nothing disturbs it, and the tokens of that answer."""
    found = {}
    for search, seed in sorted({(request.search, request.seed) for request in requests}):
        group = [request for request in requests if (request.search, request.seed) == (search, seed)]
        samples = [world(request.question) for request in group]
        images, questions = [sample.image for sample in samples], [sample.question for sample in samples]
        settings = {"seed": seed, "max_new_tokens": MAX_NEW_TOKENS}
        for request, answer in zip(group, generator.answer_batch(images, questions, search, **settings)):
            found[request] = said_by(answer), answer.tokens
    return [found[request] for request in requests]


def said_by(answer):
    """What a reply with this answer must say."""
    before = [part.text for name, part in answer.stages.items() if name != answer.grammar.conclusion and part.text]
    nodes = answer.trace.nodes.values()
    search = {
        "rounds": max(node["round"] for node in nodes),
        "retraces": len(answer.trace.events("retraced")),
        "candidates": len(nodes),
    }
    stages = {name: part.text for name, part in answer.stages.items()}
    reason = "stop" if answer.ended else "length"
    return Said(answer.conclusion, "\n\n".join(before), reason, answer.usage.generated_tokens, stages, search)


def read(reply):
    """What a reply says, and its tokens if it has them."""
    if reply.headers["Content-Type"] == "application/json":
        data = reply.json()
        choice = data["choices"][0]
        texts = (choice["message"]["content"], choice["message"]["reasoning"] or "", choice["finish_reason"])
        return _said(*texts, data["usage"], data["llava_cot"]), choice["token_ids"]
    lines = [line.removeprefix("data: ") for line in reply.text.splitlines() if line.startswith("data: ")]
    assert lines[-1] == "[DONE]", lines[-1]
    chunks = [json.loads(line) for line in lines[:-1]]
    deltas = [choice["delta"] for chunk in chunks for choice in chunk["choices"]]
    content, reasoning = ("".join(delta.get(name) or "" for delta in deltas) for name in ("content", "reasoning"))
    (reason,) = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]
    (last,) = [chunk["llava_cot"] for chunk in chunks if "search" in chunk.get("llava_cot", {})]
    return _said(content, reasoning, reason, chunks[-1]["usage"], last), None


def _said(content, reasoning, reason, usage, own):
    search = {name: own["search"][name] for name in ("rounds", "retraces", "candidates")}
    stages = {name: stage["text"] for name, stage in own["stages"].items()}
    return Said(content, reasoning, reason, usage["completion_tokens"], stages, search)


async def post(http, body, outcome):
    """Send a request until the server has a place for it, and return the reply."""
    while True:
        reply = await http.post(CHAT, content=body, headers=JSON)
        if reply.status_code != 429:
            return reply
        error = error_of(reply)
        assert (error["type"], error["code"]) == ("rate_limit_error", "queue_full")
        assert reply.headers["Content-Type"] == "application/json"
        outcome.waited += 1
        await asyncio.sleep(int(reply.headers["Retry-After"]))


def clients_of(url):
    """A client that opens a connection for each request at a time."""
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=None)
    return httpx.AsyncClient(base_url=url, limits=limits, timeout=DEADLINE)


def hostile_bodies(number, seed=0):
    """Bodies of requests that the server must refuse."""
    bodies = [body for body, _ in BODIES]
    bodies += [json.dumps({**GOOD, **change}).encode() for change, _ in WRONG]
    bodies += [json.dumps({**GOOD, "messages": asked(address)}).encode() for address, _, _ in IMAGES]
    return random.Random(seed).sample(bodies, number)


async def load(url, requests, leaving=0, hostile=(), seed=0):
    """Send all requests at once. Of the honest ones ``leaving`` go away, each after a random number of answers.

    That is no time, so that as many clients have gone on a busy machine as on a quiet one.
    """
    draw, outcome = random.Random(seed), Outcome()
    marks = [asyncio.Event() for _ in range(len(requests) + 1)]
    marks[0].set()

    async def ask(at):
        reply = await post(http, bodies[at], outcome)
        assert reply.status_code == 200, reply.text
        outcome.replies[at] = reply
        marks[len(outcome.replies)].set()

    async def leave(at, mark):
        asking = asyncio.create_task(ask(at))
        until = asyncio.create_task(mark.wait())
        await asyncio.wait((asking, until), return_when=asyncio.FIRST_COMPLETED)
        outcome.gone += asking.cancel()
        until.cancel()
        with suppress(asyncio.CancelledError):
            await asking

    async def attack(body):
        reply = await post(http, body, outcome)
        error_of(reply)
        outcome.refused[reply.status_code] += 1

    bodies = [request.body() for request in requests]
    leavers = draw.sample(range(len(requests)), leaving)
    stay = len(requests) - leaving
    work = [leave(at, marks[draw.randrange(stay // 2)]) if at in leavers else ask(at) for at in range(len(requests))]
    work += map(attack, hostile)
    draw.shuffle(work)
    async with clients_of(url) as http, asyncio.TaskGroup() as group:
        for each in work:
            group.create_task(each)
    return outcome


def faults(outcome, requests, expected):
    """What is not as it must be, in words. ``expected`` is what ``twins`` returned."""
    found = {at: read(reply) for at, reply in outcome.replies.items()}
    differ = [
        at for at, (said, tokens) in found.items() if said != expected[at][0] or tokens not in (None, expected[at][1])
    ]
    words = [f"the answer of {requests[at]} is not that of its twin" for at in differ]
    if len(found) + outcome.gone != len(requests):
        words.append(f"of {len(requests)} clients, {len(found)} were answered and {outcome.gone} have gone")
    if not set(outcome.refused) <= {400, 404, 413}:
        words.append(f"hostile requests got {dict(outcome.refused)}")
    return words
