"""Images of other servers: allowed hosts, public addresses, and no way around them."""

import asyncio
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from qformer_captioner.serving import remote

from ..fixtures import tiny
from .requests import png


class Site(BaseHTTPRequestHandler):
    """Site with an image, a redirect to it, and answers that must be refused."""

    def do_GET(self) -> None:
        """Answer a request."""
        self.server.hosts.append(self.headers["Host"])  # type: ignore[attr-defined]
        image = png(tiny.picture(3))
        status, headers, body = {
            "/image.png": (200, {}, image),
            "/redirect": (302, {"Location": "/image.png"}, b""),
            "/large": (200, {}, bytes(200_000)),
            "/gzip": (200, {"Content-Encoding": "gzip"}, image),
            "/text": (200, {}, b"This is text."),
        }.get(self.path, (404, {}, b""))
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: object) -> None:
        """Log nothing."""


@pytest.fixture
def site() -> Iterator[ThreadingHTTPServer]:
    """Return a server on this machine."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        server.hosts = []
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def public(monkeypatch):
    """Let addresses of this machine pass as public ones."""
    monkeypatch.setattr(remote, "is_public", lambda address: True)


def served(serve, site):
    """Return a client of a server that allows a site, and the address of the site."""
    host = f"localhost:{site.server_address[1]}"
    return serve(allowed_image_hosts=frozenset([host]), max_body_bytes=100_000), f"http://{host}"


def test_an_image_of_an_allowed_host_is_captioned(serve, site, public, captioner):
    client, address = served(serve, site)
    assert client.caption(f"{address}/image.png") == captioner.caption(tiny.picture(3))
    assert site.hosts == [address.removeprefix("http://")]


@pytest.mark.parametrize("path", ["/redirect", "/large", "/gzip", "/text", "/missing"])
def test_what_is_not_an_image_of_allowed_size_is_refused(serve, site, public, path):
    client, address = served(serve, site)
    response = client.chat(address + path)
    assert response.status_code == 422
    assert len(site.hosts) == 1


def test_an_allowed_host_with_an_address_of_this_machine_is_refused(serve, site):
    client, address = served(serve, site)
    response = client.chat(f"{address}/image.png")
    assert (response.status_code, site.hosts) == (400, [])
    assert "no public address" in response.json()["error"]["message"]


@pytest.mark.parametrize(
    "url",
    [
        "http://localhost/image.png",  # the allowed entry has a port
        "http://other.example/image.png",
        "http://localhost:{port}@other.example/image.png",
        "http://user@localhost:{port}/image.png",
        "http://sub.localhost:{port}/image.png",
        "http://localhost:{port}.example/image.png",
        "http://127.0.0.1:{port}/image.png",
        "https://localhost:99999/image.png",
        "http://localhost:{port}/\r\nHost: other",
        "http:///image.png",
        "http:image.png",
        "http://[::1/image.png",
    ],
)
def test_every_other_address_is_refused(serve, site, public, url):
    client, _ = served(serve, site)
    response = client.chat(url.replace("{port}", str(site.server_address[1])))
    assert (response.status_code, site.hosts) == (400, [])


def test_the_usual_port_belongs_to_the_name(serve):
    for url in ("https://images.example.org/a.png", "https://IMAGES.example.org.:443/a.png"):
        assert remote.split_allowed(url, "messages", frozenset(["images.example.org"]))[1:] == (
            "images.example.org",
            443,
        )


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "255.255.255.255",
        "::1",
        "::",
        "fe80::1%eth0",
        "fd00::1",
        "ff02::1",
        "::ffff:127.0.0.1",
        "2002:7f00:1::",
        "64:ff9b::7f00:1",
    ],
)
def test_addresses_that_are_not_public(address):
    assert not remote.is_public(address)


@pytest.mark.parametrize("address", ["1.1.1.1", "2606:4700:4700::1111", "::ffff:1.1.1.1", "64:ff9b::101:101"])
def test_public_addresses(address):
    assert remote.is_public(address)


def test_one_private_address_among_public_ones_is_enough_to_refuse(monkeypatch):
    async def resolve() -> str | None:
        loop = asyncio.get_running_loop()

        async def getaddrinfo(*args: object, **kwargs: object) -> list:
            return [(0, 0, 0, "", ("1.1.1.1", 80)), (0, 0, 0, "", ("127.0.0.1", 80))]

        monkeypatch.setattr(loop, "getaddrinfo", getaddrinfo)
        return await remote.resolve("images.example.org", 80)

    assert asyncio.run(resolve()) is None


def test_a_host_that_does_not_answer_is_given_up(serve, public, monkeypatch):
    async def wait(*args: object) -> bytes:
        await asyncio.sleep(60)
        return b""

    monkeypatch.setattr(remote, "download", wait)
    response = serve(allowed_image_hosts=frozenset(["localhost"]), read_timeout=0.1).chat("http://localhost/a.png")
    assert response.status_code == 422
    assert "too long" in response.json()["error"]["message"]
