"""Run the server: load the model, listen, and shut down without dropping what is being answered."""

import asyncio
import logging
import socket
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from types import FrameType

import uvicorn

from llava_cot.engine.config import EngineConfig
from llava_cot.generator import SwiresGenerator
from llava_cot.scoring import Scorer, resolve_scorer
from llava_cot.serve.app import create_app
from llava_cot.serve.auth import check_bind, read_keys
from llava_cot.serve.fetch import Fetcher
from llava_cot.serve.gate import Gate
from llava_cot.serve.limits import Limits
from llava_cot.serve.presets import Presets
from llava_cot.serve.protocol import with_header_timeout
from llava_cot.workers.local import load_scorer
from llava_cot.workers.names import REWARD

ABORT_SECONDS = 5  # for responses to end after their searches were aborted
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServeSettings:
    """What ``llava-cot serve`` was given; its help describes each field."""

    model: str
    host: str
    port: int
    name: str | None
    search: str
    scorer: str | None
    api_key_file: Path | None
    allow_no_key: bool
    allow_image_hosts: tuple[str, ...]
    limits: tuple[str, ...]
    drain: float
    grammar: str | None
    system: str | None
    device: str | None
    dtype: str
    quantize: str | None
    num_pages: int | None


def run(settings: ServeSettings) -> None:
    """Serve until a signal ends it.

    Raises:
        ValueError, TypeError, OSError: naming what is wrong, before the weights are loaded where that can be told.
    """
    limits, keys = read_limits(settings.limits), read_keys(settings.api_key_file)
    check_bind(settings.host, keys, settings.allow_no_key)
    name = settings.name or Path(settings.model).resolve().name
    Presets(name, settings.search)
    loads_scorer = settings.scorer is not None and settings.scorer.startswith(REWARD)
    if settings.scorer is not None and not loads_scorer:
        resolve_scorer(settings.scorer)
    check_free(settings.host, settings.port)
    fetcher = (
        Fetcher(settings.allow_image_hosts, limits.max_image_bytes, limits.max_fetch_seconds)
        if settings.allow_image_hosts
        else None
    )
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    generator = SwiresGenerator.from_pretrained(
        settings.model,
        dtype=settings.dtype,
        device=settings.device,
        quantize=settings.quantize,
        grammar=settings.grammar,
        system=settings.system,
        engine=EngineConfig(num_pages=settings.num_pages, follow_model=False),  # nobody else has the model
    )
    scorers: dict[str, Scorer] = {}
    if settings.scorer is not None and loads_scorer:
        scorers[settings.scorer] = load_scorer(settings.scorer)
    app = create_app(
        generator,
        name=name,
        search=settings.search,
        scorer=settings.scorer,
        scorers=scorers,
        limits=limits,
        api_keys=keys,
        host=settings.host,
        fetcher=fetcher,
    )
    config = uvicorn.Config(
        app,
        http=with_header_timeout(limits.max_header_seconds),
        host=settings.host,
        port=settings.port,
        access_log=False,
        server_header=False,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=ABORT_SECONDS,
    )
    Server(config, app.state.gate, settings.drain).run()


def check_free(host: str, port: int) -> None:
    """Check that the server may listen there, which it does only once the weights are loaded.

    Raises:
        OSError: naming the host or the port.
    """
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        with socket.socket(family, socket.SOCK_STREAM) as one:
            one.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            one.bind(address)
    except socket.gaierror as error:
        raise OSError(f"host must be an address or a name of this machine, got {host!r}: {error.strerror}") from None
    except OSError as error:
        raise OSError(f"port must be free for the server on {host}, got {port}: {error.strerror}") from None


def read_limits(given: Sequence[str]) -> Limits:
    """Return the limits with those that ``NAME=VALUE`` strings change.

    Raises:
        ValueError: naming the one that is wrong.
    """
    kinds: dict[str, type] = {field.name: type(field.default) for field in fields(Limits)}
    changes: dict[str, float] = {}
    for item in given:
        name, _, value = item.partition("=")
        if name not in kinds:
            raise ValueError(f"limit must be NAME=VALUE with a name of {[*kinds]}, got {item!r}")
        try:
            changes[name] = kinds[name](value)
        except ValueError:
            kind = "a whole number" if kinds[name] is int else "a number"
            raise ValueError(f"limit {name} must be {kind}, got {value!r}") from None
    return Limits(**changes)  # type: ignore[arg-type]


class Server(uvicorn.Server):
    """A server that empties its gate before it stops listening.

    After the first SIGTERM or SIGINT, /health and new requests get 503, and those in flight have ``drain`` seconds.
    What is left then is aborted. A second signal aborts at once.
    """

    def __init__(self, config: uvicorn.Config, gate: Gate, drain: float) -> None:
        super().__init__(config)
        self._gate, self._drain = gate, drain
        self._loop: asyncio.AbstractEventLoop | None = None
        self._draining: asyncio.Task[None] | None = None

    async def serve(self, sockets: list | None = None) -> None:
        """See ``uvicorn.Server.serve``."""
        self._loop = asyncio.get_running_loop()
        await super().serve(sockets)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to drain, or if that has begun, abort."""
        assert self._loop is not None
        is_second, self._gate.is_draining = self._gate.is_draining, True
        self._loop.call_soon_threadsafe(self._begin, 0.0 if is_second else self._drain)

    def _begin(self, seconds: float) -> None:
        if self._draining is not None:
            self._draining.cancel()
        log.info("shutting down: %d requests in flight have %g seconds", self._gate.in_flight, seconds)
        self._draining = asyncio.ensure_future(self._stop(seconds))

    async def _stop(self, seconds: float) -> None:
        await self._gate.drain(seconds)
        self.should_exit = True
