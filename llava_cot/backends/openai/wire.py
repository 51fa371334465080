"""The requests that are sent to a server, and the replies that come back."""

import io
import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from PIL import Image

from llava_cot.core import SamplingParams
from llava_cot.image import data_uri

KNOWN = ("model", "messages", "max_tokens", "seed", "stop", "temperature", "top_p", "logprobs")  # to the openai package


class Kind(StrEnum):
    """Which server it is, as far as requests differ."""

    LLAVA_COT = "llava-cot"  # one request for all seeds, with exact tokens; all others get one for each seed
    LLAMA_CPP = "llama.cpp"  # names the stop string in an object of its own
    OTHER = "other"


@dataclass(frozen=True)
class Prefix:
    """What the model has written so far. ``tokens`` are those of the server, or None where it does not tell them."""

    text: str
    tokens: tuple[int, ...] | None


@dataclass(frozen=True)
class Piece:
    """What the model wrote in one reply. ``stop`` is the string that ended it, and ``is_cut`` says that a limit did."""

    text: str
    count: int  # tokens
    is_cut: bool
    stop: str | None = None
    tokens: tuple[int, ...] | None = None  # None: the server does not tell them
    logprobs: tuple[float, ...] = ()
    sampling_logprobs: tuple[float, ...] = ()
    entropies: tuple[float, ...] = ()
    certainties: tuple[float, ...] = ()


@dataclass(frozen=True)
class Reply:
    """A reply: a piece for each seed, and what the server says of its cost, in tokens."""

    pieces: list[Piece]
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


def options_of(
    kind: Kind,
    model: str,
    messages: Sequence[Mapping[str, Any]],
    prefix: Prefix,
    seeds: Sequence[int],
    params: SamplingParams,
    max_tokens: int,
    stops: Sequence[str],
    *,
    logprobs: bool = True,
    token_ids: bool = True,
) -> dict[str, Any]:
    """Return the options of a chat request that continues ``prefix``, or that begins a reply where it is empty.

    Every sampling parameter is sent, because servers take those of the model's generation config for what is missing.
    """
    fields: dict[str, Any] = {
        "model": model,
        "messages": [*messages],
        "max_tokens": max_tokens,
        "temperature": params.temperature,
        "top_p": params.top_p,
        "top_k": params.top_k if params.top_k or kind is Kind.LLAVA_COT else -1,
        "min_p": params.min_p,
    }
    if stops:
        fields |= {"stop": [*stops], "include_stop_str_in_output": True}
    if prefix.text or prefix.tokens:
        fields["messages"].append({"role": "assistant", "content": prefix.text})
        fields |= {"continue_final_message": True, "add_generation_prompt": False}
    if logprobs:
        fields["logprobs"] = True
    if token_ids:
        fields["return_token_ids"] = True
    if kind is Kind.LLAVA_COT:
        own: dict[str, Any] = {"output": "raw", "seeds": [*seeds]}
        if prefix.tokens:
            own["prefix_token_ids"] = [*prefix.tokens]
        fields["llava_cot"] = own
    else:
        (fields["seed"],) = seeds
        if kind is Kind.LLAMA_CPP:
            fields["verbose"] = True
        elif stops:
            fields["no_stop_trim"] = True  # what SGLang calls it
    known = {name: value for name, value in fields.items() if name in KNOWN}
    return {**known, "extra_body": {name: value for name, value in fields.items() if name not in KNOWN}}


def read_reply(body: bytes, stops: Collection[str], number: int) -> Reply | None:
    """Return what a body says, or None if it is no chat completion of ``number`` choices with a usage."""
    try:
        data = json.loads(body)
        usage = data["usage"]
        counts = _count(usage["prompt_tokens"]), _count(usage["completion_tokens"])
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
        choices = sorted(data["choices"], key=lambda choice: choice["index"])
        if len(choices) != number:
            return None
        count, plain = counts[1] if number == 1 else None, data.get("__verbose")
        pieces = [_piece(choice, stops, count, plain) for choice in choices]
        return Reply(pieces, counts[0], _count(cached), counts[1])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None


def _count(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"a count must be a whole number, got {value!r}")
    return value


def _piece(
    choice: Mapping[str, Any], stops: Collection[str], count: int | None, plain: Mapping[str, Any] | None
) -> Piece:
    text, reason = choice["message"].get("content") or "", choice["finish_reason"]
    if not isinstance(text, str) or reason not in ("stop", "length"):
        raise ValueError(f"a choice must be a text that stopped or was cut, got {reason!r}")
    tokens = choice.get("token_ids")
    told = choice.get("stop_reason") or choice.get("matched_stop")  # vLLM's name and SGLang's; an int is a token
    if plain is not None:  # llama.cpp's own reply: without the beginning of the message, and with the stop string
        text, told = plain["content"], plain["stopping_word"]
    own = choice.get("llava_cot")
    if own is None:
        text, stop = _ended(text, stops, told)
    else:
        stop = told if told in stops else None  # the text is that of whole tokens, as the local engine's
    names = ("sampling_logprobs", "entropies", "certainties")
    measured = {name: tuple(map(float, (own or {}).get(name) or ())) for name in names}
    listed = (choice.get("logprobs") or {}).get("content") or ()
    logprobs = tuple(float(token["logprob"]) for token in listed)
    known = None if tokens is None else tuple(map(_count, tokens))
    number = len(known) if known is not None else count
    return Piece(text, _count(number), reason == "length" and stop is None, stop, known, logprobs, **measured)


def _ended(text: str, stops: Collection[str], told: Any) -> tuple[str, str | None]:
    """Return a text with the stop string that ended it, and that string.

    A server may leave the string out and name it, keep it, or go on behind it to the end of the token.
    """
    ends = [(at + len(stop), stop) for stop in stops if (at := text.find(stop)) >= 0]
    if ends:
        end, stop = min(ends)
        return text[:end], stop
    return (text + told, told) if told in stops else (text, None)


def with_images(messages: Sequence[Mapping[str, Any]], images: Sequence[Image.Image]) -> list[dict[str, Any]]:
    """Return messages of parts with each image in its place, as a data URI."""
    left = iter(images)
    return [
        {
            "role": message["role"],
            "content": [
                part if part["type"] == "text" else {"type": "image_url", "image_url": {"url": _data_uri(next(left))}}
                for part in message["content"]
            ],
        }
        for message in messages
    ]


def _data_uri(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")  # without loss, so that the model sees the same pixels as here
    return data_uri(file.getvalue(), "png")
