"""Find out which server it is, and what it can do, by a few small requests."""

import json
from collections.abc import Sequence
from typing import Any

from llava_cot.backends.openai.loop import LoopThread, gathered
from llava_cot.backends.openai.server import RemoteError, Server
from llava_cot.backends.openai.wire import Kind, Piece, Prefix, Reply, options_of
from llava_cot.core import Feature, SamplingParams
from llava_cot.endpoint import Endpoint, EndpointError, RequestFailed, RequestRefused
from llava_cot.search.search import stop_tags
from llava_cot.stages import Grammar

QUESTION = "Describe the water cycle in a few sentences."
TOKENS = 24  # of a probe's reply
SAME = 4  # characters of a reply that must come again when the reply is continued; the others may differ on a GPU
GREEDY, RANDOM = SamplingParams(temperature=0.0), SamplingParams()


async def connect(
    loop: LoopThread, endpoint: Endpoint, base_url: str, model: str | None
) -> tuple[Server, Grammar | None]:
    """Return the server, with its features, and the grammar that it says its model writes.

    Raises:
        RemoteError: the server does not answer.
        ValueError: there is no such model, or the server can't do what every search needs.
    """
    entries = await _models(endpoint, base_url)
    ids = [entry["id"] for entry in entries]
    own = [entry for entry in entries if isinstance(entry.get("llava_cot"), dict)]
    if model is None:
        if len(ids) != 1 and not own:
            raise ValueError(f"model must be one of those of {base_url}, {ids}, got None")
        model = ids[0]
    if model not in ids:
        raise ValueError(f"model must be one of those of {base_url}, {ids}, got {model!r}")
    if not own:
        (owner,) = [entry.get("owned_by") for entry in entries if entry["id"] == model]
        kind = Kind.LLAMA_CPP if owner == "llamacpp" else Kind.OTHER
        server = Server(loop, endpoint, base_url, model, kind)
        server.features = await _probed(server)
        return server, None
    (facts,) = [entry["llava_cot"] for entry in own if entry["id"] == model]
    server = Server(loop, endpoint, base_url, model, Kind.LLAVA_COT)
    server.features = frozenset(Feature) & {*facts["features"]}
    server.tags = stop_tags(grammar := Grammar(**facts["grammar"]))
    await server.send([_user()], Prefix("", ()), (0,), GREEDY, 1, ())  # the key may be for the list alone
    return server, grammar


async def _models(endpoint: Endpoint, base_url: str) -> list[dict[str, Any]]:
    try:
        body = await endpoint.models()
    except (EndpointError, RequestFailed) as error:
        path = "" if base_url.rstrip("/").endswith("/v1") else "; most base URLs end with /v1"
        raise RemoteError(f"{base_url} was asked for its models, but {error}{path}") from error
    try:
        found = [entry for entry in json.loads(body)["data"] if isinstance(entry["id"], str)]
    except (ValueError, KeyError, TypeError, RecursionError):
        raise RemoteError(f"{base_url} was asked for its models, but the reply is {body[:200]!r}") from None
    if not found:
        raise RemoteError(f"{base_url} was asked for its models, but it has none")
    return found


def _user() -> dict[str, Any]:
    return {"role": "user", "content": [{"type": "text", "text": QUESTION}]}


async def _probed(server: Server) -> frozenset[Feature]:
    """Return the features of a server that is not this project's.

    Raises:
        RemoteError: it does not answer.
        ValueError: it can't continue a message, or does not tell which stop string has ended a reply.
    """
    wanted = {"logprobs": True, "token_ids": True}

    async def ask(prefix: str, params: SamplingParams, most: int, stops: Sequence[str] = ()) -> tuple[Reply, Piece]:
        written = Prefix(prefix, None)
        options = options_of(server.kind, server.model, [_user()], written, (7,), params, most, stops, **wanted)
        reply = await server.post(options, stops, 1, most)
        return reply, reply.pieces[0]

    for name in ("", "token_ids", "logprobs"):  # a strict server may not know one of them
        wanted |= {name: False} if name else {}
        try:
            _, begun = await ask("", GREEDY, TOKENS)
            break
        except RemoteError as error:
            if not isinstance(error.__cause__, RequestRefused) or not wanted["logprobs"]:
                raise
    words = begun.text.split(" ")
    prefix = " ".join(words[: 3 * len(words) // 4])
    rest = begun.text[len(prefix) :].lstrip()[:SAME]
    if not (prefix and rest):
        raise ValueError(f"{server.base_url} must reply by some words to be probed, to {QUESTION!r} got {begun.text!r}")
    try:
        found = await gathered(ask(prefix, params, TOKENS) for params in (GREEDY, RANDOM, RANDOM))
    except RemoteError as error:
        if not isinstance(error.__cause__, RequestRefused):
            raise
        raise ValueError(f"{server.base_url} must be able to continue a message, but it can't: {error}") from error
    (_, continued), (_, one), (_, other) = found
    if not continued.text.lstrip().startswith(rest):
        raise ValueError(
            f"{server.base_url} must be able to continue a message (continue_final_message), but of {begun.text!r} it "
            f"continued {prefix!r} by {continued.text!r}"
        )
    stop = continued.text.lstrip()[:2]
    _, ended = await ask(prefix, GREEDY, TOKENS, [stop])
    if ended.stop is None:
        raise ValueError(
            f"{server.base_url} must keep a stop string in the reply, or name it, but with the stop {stop!r} the reply "
            f"{continued.text!r} became {ended.text!r}"
        )
    checks = {
        Feature.SEEDS: one.text == other.text,
        Feature.LOGPROBS: wanted["logprobs"] and bool(continued.logprobs),
        Feature.TOKEN_IDS: wanted["token_ids"] and continued.tokens is not None,
    }
    return frozenset(feature for feature, is_there in checks.items() if is_there)
