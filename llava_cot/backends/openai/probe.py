"""Find out which server it is, and what it can do, by a few small requests."""

import json
from typing import Any

from llava_cot.backends.openai.loop import LoopThread, gathered
from llava_cot.backends.openai.server import RemoteError, Server
from llava_cot.backends.openai.wire import Kind, Prefix, options_of
from llava_cot.core import Feature, SamplingParams
from llava_cot.endpoint import Endpoint, EndpointError, RequestFailed, RequestRefused
from llava_cot.search.search import stop_tags
from llava_cot.stages import Grammar

QUESTION = "Describe the water cycle in a few sentences."
TOKENS = 12  # of a probe's reply
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
        server = Server(loop, endpoint, base_url, model, Kind.OTHER)
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
        raise RemoteError(f"{base_url} was asked for its models, but {error}") from error
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
        ValueError: it can't continue a message, or does not tell which stop string has ended a reply.
    """
    wanted = {"logprobs": True, "token_ids": True}

    async def ask(prefix: str, params: SamplingParams, stops: list[str], max_tokens: int = TOKENS) -> Any:
        options = options_of(
            server.kind, server.model, [_user()], Prefix(prefix, None), (7,), params, max_tokens, stops, **wanted
        )
        return await server.post(options, stops, 1, max_tokens)

    for missing in ({}, {"token_ids": False}, {"logprobs": False}):
        wanted |= missing
        try:
            begun = await ask("", GREEDY, [])
            break
        except RemoteError as error:
            if not isinstance(error.__cause__, RequestRefused) or not wanted["logprobs"]:
                raise
    (written,) = begun.pieces
    if not written.text.strip():
        raise ValueError(f"{server.base_url} must write a reply to {QUESTION!r} to be probed, got {written.text!r}")
    prefix = written.text.rstrip()
    try:
        first, *again = await gathered([ask(prefix, GREEDY, []), ask(prefix, RANDOM, []), ask(prefix, RANDOM, [])])
    except RemoteError as error:
        raise ValueError(f"{server.base_url} must be able to continue a message, but it can't: {error}") from error
    (continued,) = first.pieces
    if first.prompt_tokens > begun.prompt_tokens + begun.completion_tokens:
        raise ValueError(
            f"{server.base_url} must be able to continue a message, but it took one with continue_final_message as "
            f"ended: its prompt had {first.prompt_tokens} tokens, those of the question and the reply were "
            f"{begun.prompt_tokens} + {begun.completion_tokens}"
        )
    await _check_stop(server, ask, prefix, continued.text)
    found = set()
    if again[0].pieces[0].text == again[1].pieces[0].text:
        found.add(Feature.SEEDS)
    if wanted["logprobs"] and continued.logprobs:
        found.add(Feature.LOGPROBS)
    if wanted["token_ids"] and continued.tokens is not None:
        found.add(Feature.TOKEN_IDS)
    return frozenset(found)


async def _check_stop(server: Server, ask: Any, prefix: str, text: str) -> None:
    """Check that a reply which a stop string ends has that string, or names it.

    Raises:
        ValueError: it has neither.
    """
    middle = len(text) // 2
    stop = next((text[at : at + 2] for at in range(middle, len(text) - 1) if text[at : at + 2].strip()), None)
    if stop is None:
        raise ValueError(f"{server.base_url} must go on with its reply to be probed, got {text!r}")
    (ended,) = (await ask(prefix, GREEDY, [stop])).pieces
    if ended.stop is None:
        raise ValueError(
            f"{server.base_url} must keep a stop string in its reply, or name it, but with the stop {stop!r} the reply "
            f"{text!r} became {ended.text!r}"
        )
