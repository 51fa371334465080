"""The fetcher against a real TLS server on this machine: what it asks for, what it refuses, and where it connects."""

import asyncio
import shutil
import ssl
import subprocess
from collections.abc import Callable

import pytest

from llava_cot.serve.errors import RequestError
from llava_cot.serve.fetch import MAX_HOPS, Fetcher, is_public, parse_host, parse_url
from llava_cot.serve.held import Held
from llava_cot.serve.images import ImageReader
from llava_cot.serve.limits import Limits

PARAM = "messages[0].content[0].image_url.url"
REFUSED_URL = "An image's URL must be a plain https URL with a host name."
REFUSED_HOST = "The host of an image's URL is not one that this server may download from."
FAILED = "The image could not be downloaded."
NAMES = ("images.test", "other.test")

needs_openssl = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl to make a certificate")


@pytest.fixture(scope="module")
def certificate(tmp_path_factory) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("certificate")
    key, cert = str(folder / "key.pem"), str(folder / "cert.pem")
    names = ",".join(f"DNS:{name}" for name in NAMES)
    command = f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -keyout {key} -out {cert} -days 2"
    subprocess.run([*command.split(), "-subj", "/CN=test", "-addext", f"subjectAltName={names}"], check=True)
    return cert, key


class Host:
    """A TLS server that sends the bytes that stand in ``replies`` under the path, and notes what it was asked."""

    def __init__(self, certificate: tuple[str, str]) -> None:
        self.replies: dict[str, bytes] = {}
        self.asked: list[tuple[str | None, str]] = []  # the server name of the handshake, the head of the request
        self.port = 0
        self.hangs = asyncio.Event()  # set while a client waits for an answer that never comes
        self._context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self._context.load_cert_chain(*certificate)
        self._context.sni_callback = self._note
        self._name: str | None = None

    async def __aenter__(self) -> "Host":
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0, ssl=self._context)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    def _note(self, _socket: object, name: str | None, _context: object) -> None:
        self._name = name

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        name = self._name
        try:
            head = (await reader.readuntil(b"\r\n\r\n")).decode()
            self.asked.append((name, head))
            reply = self.replies.get(head.split()[1])
            if reply is None:
                self.hangs.set()
                await reader.read()  # ends when the client gives up
            else:
                writer.write(reply)
                await writer.drain()
        except (ConnectionError, ssl.SSLError):
            pass
        finally:
            writer.transport.abort() if reply is None else writer.close()


def answer(body: bytes = b"file", status: str = "200 OK", **headers: str) -> bytes:
    lines = {"Content-Length": str(len(body)), **{name.replace("_", "-"): value for name, value in headers.items()}}
    head = "".join(f"{name}: {value}\r\n" for name, value in lines.items())
    return f"HTTP/1.1 {status}\r\n{head}\r\n".encode("latin-1") + body


def moved(location: str, status: str = "302 Found") -> bytes:
    return answer(b"", status, Location=location)


Script = Callable[[Host], dict[str, bytes]]


def fetch(certificate, script: Script, path: str = "/a.png", *, addresses=None, trusted=True, **options) -> tuple:
    """The result of fetching ``path`` from images.test, or the error, and what the host was asked."""

    async def run():
        resolved: list[str] = []

        async def resolver(name: str, port: int) -> list[str]:
            resolved.append(name)
            return (addresses or {}).get(name, ["127.0.0.1"])

        async with Host(certificate) as host:
            host.replies = script(host)
            context = ssl.create_default_context(cafile=certificate[0] if trusted else None)
            given = {"hosts": [f"{NAMES[0]}:{host.port}"], "max_bytes": 1000, "seconds": 30.0, **options}
            given.setdefault("is_allowed_address", lambda address: address == "127.0.0.1" or is_public(address))
            fetcher = Fetcher(**given, resolver=resolver, ssl_context=context)
            try:
                found = await fetcher.fetch(f"https://{NAMES[0]}:{host.port}{path}", PARAM)
            except RequestError as error:
                assert error.param == PARAM
                found = error
            return found, host.asked, resolved

    return asyncio.run(run())


@needs_openssl
def test_a_file_comes_from_the_pinned_address_under_its_own_name(certificate, monkeypatch):
    for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY"):
        monkeypatch.setenv(name, "http://127.0.0.1:9")
    found, asked, resolved = fetch(certificate, lambda host: {"/a.png?x=1&y=%20": answer(b"body")}, "/a.png?x=1&y=%20")
    assert found == b"body"
    assert resolved == ["images.test"]  # once
    ((name, head),) = asked
    assert name == "images.test"
    lines = dict(line.split(": ") for line in head.strip().split("\r\n")[1:])
    assert lines["Host"].startswith("images.test:")
    assert lines["Accept-Encoding"] == "identity"
    assert not {"Cookie", "Authorization", "Referer"} & set(lines)


@needs_openssl
def test_a_chunked_body_and_a_relative_redirect(certificate):
    chunked = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n2\r\nbo\r\n2\r\ndy\r\n0\r\n\r\n"
    found, asked, resolved = fetch(certificate, lambda host: {"/a.png": moved("/b.png"), "/b.png": chunked})
    assert found == b"body"
    assert resolved == ["images.test"] * 2  # each hop is resolved and checked
    assert "Cookie" not in asked[1][1]


@needs_openssl
@pytest.mark.parametrize(
    "location, words",
    [
        ("http://images.test/a.png", REFUSED_URL),
        ("https://other.test/", REFUSED_HOST),
        ("https://images.test/", REFUSED_HOST),  # the default port is not on the list
        ("https://127.0.0.1/", REFUSED_URL),
        ("https://169.254.169.254/latest/meta-data", REFUSED_URL),
        ("https://[::1]/", REFUSED_URL),
        ("//other.test/", REFUSED_URL),
        ("/\\other.test/", REFUSED_URL),
        ("\\\\other.test", REFUSED_URL),
        ("file:///etc/passwd", REFUSED_URL),
        ("gopher://127.0.0.1:25/", REFUSED_URL),
        ("b.png", REFUSED_URL),
        ("", REFUSED_URL),
        ("https://images.test@other.test/", REFUSED_URL),
        ("/b.png#fragment", REFUSED_URL),
        ("/caf\xe9.png", REFUSED_URL),
    ],
)
def test_each_redirect_is_checked_like_the_first_url(certificate, location, words):
    found, asked, _ = fetch(certificate, lambda host: {"/a.png": moved(location)})
    assert (found.status, found.message) == (400, words)
    assert len(asked) == 1


@needs_openssl
def test_a_redirect_to_a_name_with_a_private_address_is_refused(certificate):
    async def run():
        async def resolver(name: str, port: int) -> list[str]:
            return ["127.0.0.1"] if name == "images.test" else ["127.0.0.1", "10.0.0.1"]

        async with Host(certificate) as host:
            host.replies = {"/a.png": moved(f"https://other.test:{host.port}/")}
            hosts = [f"{name}:{host.port}" for name in NAMES]
            context = ssl.create_default_context(cafile=certificate[0])
            fetcher = Fetcher(
                *(hosts, 1000, 30.0),
                resolver=resolver,
                ssl_context=context,
                is_allowed_address=lambda address: address == "127.0.0.1",
            )
            with pytest.raises(RequestError, match=FAILED):
                await fetcher.fetch(f"https://{hosts[0]}/a.png", PARAM)
            return len(host.asked)

    assert asyncio.run(run()) == 1


@needs_openssl
@pytest.mark.parametrize("hops, works", [(MAX_HOPS, True), (MAX_HOPS + 1, False), (100, False)])
def test_redirects_end(certificate, hops, works):
    replies = {f"/{hop}": moved(f"/{hop + 1}") for hop in range(hops)} | {f"/{hops}": answer()}
    found, asked, _ = fetch(certificate, lambda host: replies, "/0")
    assert len(asked) == MAX_HOPS + 1
    assert found == b"file" if works else found.message == "The image's URL redirects more than 3 times."


@needs_openssl
@pytest.mark.parametrize(
    "reply, status, words",
    [
        (answer(b"", Content_Length="1001"), 413, "An image may have at most 1000 bytes."),
        (answer(b"", Content_Length="9" * 15), 413, "An image may have at most 1000 bytes."),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b"a" * 1001, 413, "An image may have at most 1000 bytes."),
        (
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
            + b"100\r\n"
            + b"a" * 256
            + b"\r\n"
            + b"300\r\n" * 9,
            *(400, FAILED),
        ),
        (answer(b"", Content_Length="900") + b"a" * 100, 400, FAILED),  # it ends too early
        (b"HTTP/1.1 200 OK\r\n" + b"X: " + b"a" * 100_000, 400, FAILED),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\nContent-Length: 4\r\n\r\nfile", 400, FAILED),
        (b"HTTP/1.1 100 Continue\r\n\r\n" * 10_000, 413, "An image may have at most 1000 bytes."),
        (answer(Content_Encoding="gzip"), 400, "The image could not be downloaded: its host compresses it."),
        (answer(status="404 Not Found"), 400, "The image could not be downloaded: its host answered 404."),
        (answer(status="206 Partial Content"), 400, "The image could not be downloaded: its host answered 206."),
        (answer(status="302 Found"), 400, "The image could not be downloaded: its host answered 302."),
        (answer(status="500 Oh"), 400, "The image could not be downloaded: its host answered 500."),
        (b"SSH-2.0-OpenSSH_9.6\r\n", 400, FAILED),
        (b"", 400, FAILED),
    ],
    ids=range(15),
)
def test_answers_that_are_refused(certificate, reply, status, words):
    found, _, _ = fetch(certificate, lambda host: {"/a.png": reply})
    assert (found.status, found.message) == (status, words)


@needs_openssl
def test_a_host_that_does_not_answer_is_left(certificate):
    async def run():
        async def resolver(name: str, port: int) -> list[str]:
            return ["127.0.0.1"]

        async with Host(certificate) as host:
            context = ssl.create_default_context(cafile=certificate[0])
            address = f"images.test:{host.port}"
            options = {"resolver": resolver, "ssl_context": context, "is_allowed_address": lambda address: True}
            with pytest.raises(RequestError, match=r"The image could not be downloaded in 0\.2 seconds\."):
                await Fetcher([address], 1000, 0.2, **options).fetch(f"https://{address}/hangs", PARAM)
            host.hangs.clear()
            waiting = asyncio.create_task(
                Fetcher([address], 1000, 600.0, **options).fetch(f"https://{address}/", PARAM)
            )
            await asyncio.wait_for(host.hangs.wait(), 60)
            waiting.cancel()  # as when the client of the request has gone
            with pytest.raises(asyncio.CancelledError):
                await waiting

    asyncio.run(run())


@needs_openssl
def test_a_certificate_is_verified(certificate):
    found, asked, _ = fetch(certificate, lambda host: {"/a.png": answer()}, trusted=False)
    assert (found.message, asked) == (FAILED, [])


@needs_openssl
@pytest.mark.parametrize("addresses", [[], ["10.0.0.1"], ["93.184.215.14", "127.0.0.1"], ["::1"], ["not an address"]])
def test_one_private_address_of_a_name_is_enough_to_refuse_it(certificate, addresses):
    options = {"addresses": {"images.test": addresses}, "is_allowed_address": is_public}
    found, asked, _ = fetch(certificate, lambda host: {"/a.png": answer()}, **options)
    assert (found.message, asked) == (FAILED, [])


@needs_openssl
def test_the_next_address_is_tried_where_one_refuses_the_connection(certificate):
    options = {"addresses": {"images.test": ["127.0.0.2", "127.0.0.1"]}, "is_allowed_address": lambda address: True}
    found, _, _ = fetch(certificate, lambda host: {"/a.png": answer()}, **options)
    assert found == b"file"


def test_a_reader_with_a_fetcher_takes_https_alone():
    async def resolver(name: str, port: int) -> list[str]:
        raise AssertionError("nothing is resolved for a URL that is refused")

    async def refusal(url: str) -> str:
        fetcher = Fetcher(["images.test"], 1000, 5.0, resolver=resolver)
        with pytest.raises(RequestError) as caught:
            await ImageReader(Limits(), fetcher).read([(PARAM, url)], Held(Limits()).holding())
        return caught.value.message

    for url in ("http://images.test/a.png", "file:///etc/passwd", "/etc/passwd", " https://images.test/", ""):
        assert asyncio.run(refusal(url)) == "An image must be a base64 data URI or an https URL."
    assert asyncio.run(refusal("https://other.test/")) == REFUSED_HOST
    assert asyncio.run(refusal("HTTPS://images.test\\@other.test/")) == REFUSED_URL


@pytest.mark.parametrize(
    "url, host, port, path",
    [
        ("https://images.test", "images.test", 443, "/"),
        ("HTTPS://Images.TEST/A/b.png?q=1?2", "images.test", 443, "/A/b.png?q=1?2"),
        ("https://xn--bcher-kva.example:8443/%C3%A4", "xn--bcher-kva.example", 8443, "/%C3%A4"),
        ("https://localhost:443/", "localhost", 443, "/"),
    ],
)
def test_plain_urls_are_taken_apart(url, host, port, path):
    target = parse_url(url)
    assert (target.host, target.port, target.path) == (host, port, path)


@pytest.mark.parametrize(
    "url",
    [
        *("http://a.test/", "https:/a.test/", "https:a.test", "https:///a.test", "https://", "a.test", "//a.test/"),
        *("https://user@a.test/", "https://user:word@a.test/", "https://a.test@b.test/", "https://@a.test/"),
        *(
            "https://a.test\\@b.test/",
            "https://a.test\\b",
            "https:\\\\a.test/",
            "https://a.test/\\b",
            "https://a.test/#b",
        ),
        *(
            "https://a.test/\t",
            "https://a.te\tst/",
            "https://a.test/\n",
            "https://a.test/ ",
            " https://a.test/",
            "https://a.test\0/",
        ),
        *(
            "https://a.test/\r\nX-A: b",
            "https://a.test/%0",
            "https://a.test/%zz",
            "https://a%2etest/",
            "https://%61.test/",
        ),
        *(
            "https://a.test./",
            "https://.a.test/",
            "https://a..test/",
            "https://-a.test/",
            "https://a-.test/",
            "https://a_b.test/",
        ),
        *("https://127.0.0.1/", "https://127.1/", "https://2130706433/", "https://0x7f000001/", "https://0177.0.0.1/"),
        *(
            "https://0x7f.1/",
            "https://a.127/",
            "https://a.0x7f/",
            "https://[::1]/",
            "https://[fe80::1%25eth0]/",
            "https://::1/",
        ),
        *(
            "https://[::ffff:127.0.0.1]/",
            "https://b\u00fccher.test/",
            "https://a\u3002test/",
            "https://\uff41.test/",
            "https://a\u00ad.test/",
        ),
        *(
            "https://a.test:/",
            "https://a.test:0/",
            "https://a.test:65536/",
            "https://a.test:443443/",
            "https://a.test:+443/",
        ),
        *(
            "https://a.test:80:443/",
            "https://a.test:http/",
            "https://a.test?q",
            "https://a.test/{b}",
            "https://a.test/<b>",
            'https://a.test/"',
        ),
        *("https://" + "a" * 64 + ".test/", "https://" + "a." * 127 + "test/", "https://a.test/" + "b" * 2048, ""),
    ],
)
def test_other_urls_are_refused_whole(url):
    with pytest.raises(ValueError):
        parse_url(url)


@pytest.mark.parametrize(
    "host", ["", "*", "*.test", "a.test/", "https://a.test", "127.0.0.1", "[::1]", "a.test:0", "a b"]
)
def test_an_allowed_host_is_a_name(host):
    with pytest.raises(ValueError, match="an allowed host must be a name in ASCII, with or without a port, got"):
        Fetcher([host], 1000, 1.0)
    assert parse_host("A.test:8443") == ("a.test", 8443)


@pytest.mark.parametrize(
    "address",
    [
        *("0.0.0.0", "0.1.2.3", "10.0.0.1", "100.64.0.1", "100.127.255.255", "127.0.0.1", "127.255.255.254"),
        *("169.254.169.254", "172.16.0.1", "172.31.255.255", "192.0.0.1", "192.0.2.1", "192.88.99.1", "192.168.1.1"),
        *("198.18.0.1", "198.19.255.255", "198.51.100.1", "203.0.113.1", "224.0.0.1", "239.255.255.255", "240.0.0.1"),
        *("255.255.255.255", "::", "::1", "::ffff:127.0.0.1", "::ffff:8.8.8.8", "::127.0.0.1", "64:ff9b::7f00:1"),
        *("64:ff9b:1::a00:1", "100::1", "2001::1", "2001:db8::1", "2001:10::1", "2002:7f00:1::", "2002:808:808::1"),
        *("3fff::1", "5f00::1", "fc00::1", "fd00:ec2::254", "fe80::1", "fe80::1%eth0", "fec0::1", "ff02::1"),
        *("2606:4700::1%eth0", "127.1", "0x7f000001", "2130706433", "0177.0.0.1", "localhost", "", "8.8.8.8 "),
    ],
)
def test_addresses_that_are_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize(
    "address",
    [
        *("8.8.8.8", "93.184.215.14", "100.63.255.255", "100.128.0.1", "172.15.0.1", "172.32.0.1", "192.0.1.1"),
        *("223.255.255.255", "2606:4700::1111", "2a00:1450::1", "2001:200::1", "2001:4860::8888"),
    ],
)
def test_addresses_that_are_public(address):
    assert is_public(address)
