"""Download images over https from hosts that are allowed by name. This is the one place of the server that does.

Checks and connections can't disagree. A URL has to match one pattern whole, and the request is built from the parts
that matched. A name is resolved once, all its addresses are checked, and the connection goes to one of those. Each
redirect passes the same way. The environment's proxies and cookies have no part in it.
"""

import asyncio
import logging
import re
import socket
import ssl
from collections.abc import Awaitable, Callable, Iterable
from dataclasses import dataclass
from ipaddress import IPv4Address, ip_address, ip_network

import h11

from llava_cot.serve.errors import RequestError

log = logging.getLogger(__name__)

Resolve = Callable[[str, int], Awaitable[list[str]]]

MAX_URL = 2048  # characters
MAX_HOPS = 3  # redirects that are followed
MAX_OVERHEAD = 2**16  # bytes of a response beside its image
MAX_ADDRESSES = 4  # of a name that are tried
REDIRECTS = (301, 302, 303, 307, 308)

_NAME = r"(?:[a-z0-9](?:[a-z0-9-]{0,61}[a-z0-9])?\.)*[a-z](?:[a-z0-9-]{0,61}[a-z0-9])?"  # the last label is no number
_CHAR = r"(?:[A-Za-z0-9._~!$&'()*+,;=:@/-]|%[0-9A-Fa-f]{2})"
_HOST = re.compile(rf"({_NAME})(?::([1-9][0-9]{{0,4}}))?", re.IGNORECASE)
_PATH = re.compile(rf"/{_CHAR}*(?:\?(?:{_CHAR}|\?)*)?")
_URL = re.compile(rf"(?i:https)://([A-Za-z0-9.:-]+)({_PATH.pattern})?")

# Special-purpose addresses (IANA's registries, RFC 6890). Of IPv6, only what is not special in 2000::/3 is public, so
# that v4-mapped addresses, NAT64, link-local, unique local and multicast addresses need no entry.
SPECIAL_4 = [
    ip_network(block)
    for block in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24"),
        *("192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24"),
        *("224.0.0.0/4", "240.0.0.0/4"),
    )
]
PUBLIC_6 = ip_network("2000::/3")
SPECIAL_6 = [ip_network(block) for block in ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")]


def is_public(address: str) -> bool:
    """Whether an IP address is one of the internet's, and not of a private, local, tunnelled or reserved block."""
    try:
        ip = ip_address(address)
    except ValueError:
        return False
    if isinstance(ip, IPv4Address):
        return not any(ip in block for block in SPECIAL_4)
    return ip.scope_id is None and ip in PUBLIC_6 and not any(ip in block for block in SPECIAL_6)


async def resolve(host: str, port: int) -> list[str]:
    """Return the addresses of a name, as the system knows them. Raises OSError if it has none."""
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


@dataclass(frozen=True)
class Target:
    """Where a URL points. ``path`` has its query."""

    host: str
    port: int
    path: str

    @property
    def authority(self) -> str:
        """The host, and the port if it is not that of https."""
        return self.host if self.port == 443 else f"{self.host}:{self.port}"


def parse_host(text: str) -> tuple[str, int]:
    """Return the name, in lower case, and the port of "name" or "name:port".

    Raises:
        ValueError: it is something else, such as an IP address.
    """
    match = _HOST.fullmatch(text)
    port = int(match[2] or 443) if match else 0
    if not match or len(match[1]) > 253 or port > 65535:
        raise ValueError(f"an allowed host must be a name in ASCII, with or without a port, got {text!r}")
    return match[1].lower(), port


def parse_url(url: str) -> Target:
    """Return the parts of an https URL.

    Raises:
        ValueError: it is no https URL of a name in ASCII, with or without a port, a path and a query. User names,
            fragments, IP addresses, backslashes, spaces, control characters and wrong percent encodings are refused.
    """
    match = _URL.fullmatch(url) if len(url) <= MAX_URL else None
    if match is None:
        raise ValueError("not a plain https URL")
    return Target(*parse_host(match[1]), match[2] or "/")


class Fetcher:
    """Downloads files from allowed hosts.

    Args:
        hosts: "name" for port 443 or "name:port", each an exact host name.
        max_bytes: of a file.
        seconds: for one file, with all its redirects.
        resolver: gives the addresses of a name.
        ssl_context: None verifies certificates as the system does.
        is_allowed_address: which addresses may be connected to. The default refuses all but public ones.

    Raises:
        ValueError: a host is no host name.
    """

    def __init__(
        self,
        hosts: Iterable[str],
        max_bytes: int,
        seconds: float,
        *,
        resolver: Resolve = resolve,
        ssl_context: ssl.SSLContext | None = None,
        is_allowed_address: Callable[[str], bool] = is_public,
    ) -> None:
        self.hosts = frozenset(parse_host(host) for host in hosts)
        self.max_bytes, self.seconds = max_bytes, seconds
        self._resolve, self._is_allowed = resolver, is_allowed_address
        self._ssl = ssl.create_default_context() if ssl_context is None else ssl_context

    async def fetch(self, url: str, param: str) -> bytes:
        """Return the bytes of the file at ``url``.

        Args:
            param: the field of the request that has the URL, for the error.

        Raises:
            RequestError: 400 if the URL is refused or does not answer with a file, 413 if the file is too large.
        """
        try:
            async with asyncio.timeout(self.seconds):
                return await self._follow(url, param)
        except TimeoutError:
            raise _refused(param, f"The image could not be downloaded in {self.seconds:g} seconds.") from None
        except (OSError, UnicodeError, h11.ProtocolError) as error:
            log.info("%s: %r can't be downloaded: %r", param, url, error)
            raise _refused(param, "The image could not be downloaded.") from None

    async def _follow(self, url: str, param: str) -> bytes:
        for _ in range(MAX_HOPS + 1):
            target = self._checked(url, param)
            reply = await self._get(target, await self._addresses(target, param), param)
            if isinstance(reply, bytes):
                return reply
            url = f"https://{target.authority}{reply}" if re.match("/(?!/)", reply) else reply
        raise _refused(param, f"The image's URL redirects more than {MAX_HOPS} times.")

    def _checked(self, url: str, param: str) -> Target:
        try:
            target = parse_url(url)
        except ValueError:
            raise _refused(param, "An image's URL must be a plain https URL with a host name.") from None
        if (target.host, target.port) not in self.hosts:
            raise _refused(param, "The host of an image's URL is not one that this server may download from.")
        return target

    async def _addresses(self, target: Target, param: str) -> list[str]:
        addresses = await self._resolve(target.host, target.port)
        if not addresses or not all(map(self._is_allowed, addresses)):
            log.warning("%s: %s has an address that is refused: %s", param, target.host, addresses)
            raise _refused(param, "The image could not be downloaded.")
        return addresses[:MAX_ADDRESSES]

    async def _get(self, target: Target, addresses: list[str], param: str) -> bytes | str:
        """The file, or where it has moved to."""
        reader, writer = await self._connect(target, addresses)
        try:
            return await self._exchange(reader, writer, target, param)
        finally:
            writer.transport.abort()  # a peer that does not end the connection can't hold it

    async def _connect(self, target: Target, addresses: list[str]) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        failure: OSError = OSError("no address")
        for address in addresses:
            try:
                return await asyncio.open_connection(address, target.port, ssl=self._ssl, server_hostname=target.host)
            except OSError as error:
                failure = error
        raise failure

    async def _exchange(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, target: Target, param: str
    ) -> bytes | str:
        connection = h11.Connection(h11.CLIENT)
        headers = [
            ("Host", target.authority),
            ("Accept", "image/png, image/jpeg, image/webp, image/gif"),
            ("Accept-Encoding", "identity"),
            ("User-Agent", "llava-cot"),
            ("Connection", "close"),
        ]
        writer.write(connection.send(h11.Request(method="GET", target=target.path, headers=headers)) or b"")
        writer.write(connection.send(h11.EndOfMessage()) or b"")
        await writer.drain()
        received, body = 0, bytearray()
        while True:
            event = connection.next_event()
            if event is h11.NEED_DATA:
                data = await reader.read(2**16)
                received += len(data)
                if received > self.max_bytes + MAX_OVERHEAD:
                    raise too_large(param, self.max_bytes)
                connection.receive_data(data)
            elif isinstance(event, h11.Response):
                moved = self._judge(event, param)
                if moved is not None:
                    return moved
            elif isinstance(event, h11.Data):
                body += event.data
                if len(body) > self.max_bytes:
                    raise too_large(param, self.max_bytes)
            elif isinstance(event, h11.EndOfMessage):
                return bytes(body)
            elif not isinstance(event, h11.InformationalResponse):
                raise OSError(f"the connection was closed: {event!r}")

    def _judge(self, response: h11.Response, param: str) -> str | None:
        """Where a redirect leads, or None if the file follows."""
        values = {name: value for name, value in response.headers}
        if response.status_code in REDIRECTS and b"location" in values:
            return values[b"location"].decode("latin-1")
        if response.status_code != 200:
            raise _refused(param, f"The image could not be downloaded: its host answered {response.status_code}.")
        if values.get(b"content-encoding", b"identity").lower() != b"identity":
            raise _refused(param, "The image could not be downloaded: its host compresses it.")
        if int(values.get(b"content-length", b"0")) > self.max_bytes:  # h11 has checked that it is a number
            raise too_large(param, self.max_bytes)
        return None


def _refused(param: str, message: str) -> RequestError:
    return RequestError(400, message, param, "image_url")


def too_large(param: str, max_bytes: int) -> RequestError:
    """What is raised for an image whose file is too large."""
    return RequestError(413, f"An image may have at most {max_bytes} bytes.", param, "image_too_large")
