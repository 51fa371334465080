"""Searches on a model that a server runs. No torch and no transformers are needed here."""

import os
from collections.abc import Sequence
from types import NoneType, TracebackType
from typing import Any

from PIL.Image import Image

from llava_cot.backends.openai import probe
from llava_cot.backends.openai.loop import LoopThread
from llava_cot.backends.openai.server import Server
from llava_cot.backends.openai.wire import with_images
from llava_cot.core import Bos, Feature, check_kind, whole_number
from llava_cot.endpoint import Endpoint
from llava_cot.grammars import WHOLE, named_grammar
from llava_cot.question import Question, messages_of
from llava_cot.scoring import Calibration
from llava_cot.search.search import stop_tags
from llava_cot.searcher import Searcher
from llava_cot.stages import Grammar


class RemoteGenerator(Searcher):
    """Searches on a model that a server runs. ``connect`` makes one.

    It has the methods of ``SwiresGenerator`` that need no model here: ``answer``, ``answer_batch``, ``stream``, ``aio``
    and ``calibrate``. Close it, or use it in a ``with`` statement, to end its threads and connections.

    Attributes:
        features: what the server was seen to do beyond returning text.
    """

    bos: Bos = "one"

    def __init__(
        self,
        server: Server,
        grammar: Grammar | None,
        system: str | None = None,
        calibrations: Sequence[Calibration] = (),
    ) -> None:
        self.server, self.system = server, system
        self.knows_grammar, self.grammar = grammar is not None, grammar or WHOLE
        self.calibrations = {calibration.scorer: calibration for calibration in calibrations}
        server.tags = stop_tags(self.grammar)

    @property
    def features(self) -> frozenset[Feature]:
        """What the server was seen to do beyond returning text."""
        return self.server.features

    def close(self) -> None:
        """Cancel all searches, and end the threads and the connections."""
        self.aio.engine.close()
        self.server.close()

    def __enter__(self) -> "RemoteGenerator":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def backend(self) -> Server:
        """The server."""
        return self.server

    @property
    def source(self) -> str:
        """The model and where it is served."""
        return f"{self.server.model} at {self.server.base_url}"

    @property
    def versions(self) -> dict[str, str]:
        """The kind of the server, which does not tell its version."""
        return {"server": self.server.kind.value}

    @property
    def weights_sha256(self) -> None:
        """Unknown here."""
        return None

    @property
    def turn_tokens(self) -> None:
        """None: a server does not read given tokens."""
        return None

    def prompt(self, images: Sequence[Image], question: Question) -> list[dict[str, Any]]:
        """Return the messages of a question, with its images as data URIs."""
        return with_images(messages_of(question, len(images), self.system), images)

    def decode(self, tokens: Sequence[int]) -> str:
        """Refuse: a server does not tell the texts of tokens.

        Raises:
            ValueError: always.
        """
        raise ValueError("tokens must not be turned into text by a search on a server, which does not tell their texts")

    def detokeniser(self) -> None:
        """None: a server does not tell the texts of tokens."""
        return None


def connect(
    base_url: str,
    *,
    model: str | None = None,
    api_key: str | None = None,
    grammar: Grammar | str | None = None,
    system: str | None = None,
    calibrations: Sequence[Calibration] = (),
    timeout: float = 600.0,
    max_retries: int = 4,
    rpm: float | None = None,
    tpm: float | None = None,
) -> RemoteGenerator:
    """Connect to a server of OpenAI's protocol that can continue a message, such as vLLM, SGLang and this project's.

    Args:
        base_url: where the protocol begins, such as ``"http://localhost:8000/v1"``.
        model: the model there; by default the only one, or that of ``llava-cot serve``.
        api_key: the key; by default that of the environment's ``OPENAI_API_KEY``, if there is one.
        grammar: the stages that the model writes, or the name of one of ``llava_cot.grammars.GRAMMARS``. A server of
            this project tells its own.
        system: the system prompt of every question.
        calibrations: quantiles of scores, by scorer, that thresholds are looked up in.
        timeout: the limit of one try of a request in seconds.
        max_retries: the most tries of a request after the first one.
        rpm: requests a minute at most.
        tpm: tokens a minute at most.

    Raises:
        RemoteError: the server does not answer, or refuses the key.
        ValueError, TypeError: naming the argument that is wrong, or what the server can't do.
    """
    check_kind("base_url", base_url, str, "a URL")
    if not base_url.startswith(("http://", "https://")):
        raise ValueError(f"base_url must begin with http:// or https://, got {base_url!r}")
    check_kind("model", model, (str, NoneType), "the name of a model or None")
    check_kind("grammar", grammar, (Grammar, str, NoneType), "a Grammar, the name of one or None")
    check_kind("system", system, (str, NoneType), "a string or None")
    check_kind("calibrations", calibrations, (list, tuple), "a list of Calibrations")
    for calibration in calibrations:
        check_kind("calibrations", calibration, Calibration, "a list of Calibrations")
    for name, value in {"timeout": timeout, "rpm": rpm, "tpm": tpm}.items():
        if value is not None and not (isinstance(value, (int, float)) and value > 0):
            raise ValueError(f"{name} must be a number above 0, got {value!r}")
    retries = whole_number("max_retries", max_retries, 0)
    known = named_grammar(grammar) if isinstance(grammar, str) else grammar
    key = api_key or os.environ.get("OPENAI_API_KEY") or "none"
    endpoint = Endpoint(base_url, key, timeout=timeout, max_retries=retries, rpm=rpm, tpm=tpm)
    loop = LoopThread()
    try:
        server, own = loop.start(probe.connect(loop, endpoint, base_url.rstrip("/"), model)).result()
        if own is not None and known is not None and known.to_dict() != own.to_dict():
            raise ValueError(f"grammar must be that of the server's model, {own}, got {known}")
    except BaseException:
        loop.close(endpoint.close)
        raise
    return RemoteGenerator(server, known or own, system, calibrations)


__all__ = ["RemoteGenerator", "connect"]
