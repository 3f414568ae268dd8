"""Images from other servers, of hosts that the operator allows.

The name of a host is resolved once. All of its addresses must be public, and the connection goes to one of them. A name
can therefore not lead to the server's own machine or network. Redirects are not followed.
"""

import asyncio
import ipaddress
import socket
from urllib.parse import SplitResult, urlsplit

from huggingface_hub.utils import httpx

from .errors import ApiError
from .options import ServingOptions

PORTS = {"http": 80, "https": 443}


async def fetch(url: str, param: str, options: ServingOptions, max_bytes: int) -> bytes:
    """Return the content of an image on an allowed host.

    Args:
        url: its address.
        param: field of the request that holds it, for error messages.
        options: options of the server.
        max_bytes: largest size.

    Raises:
        ApiError: if the address is not allowed, the image is too large, or it cannot be downloaded.
    """
    parts, host, port = split_allowed(url, param, options.allowed_image_hosts)
    try:
        async with asyncio.timeout(options.read_timeout):
            address = await resolve(host, port)
            if address is None:
                raise ApiError(400, f"The host {host[:100]!r} has no public address: send a data: URL.", param)
            return await download(parts, host, port, address, max_bytes)
    except ApiError:
        raise
    except Exception as error:  # the client raises errors of many libraries
        reason = "it took too long" if isinstance(error, TimeoutError) else str(error)[:100] or type(error).__name__
        raise ApiError(
            422, f"An image cannot be downloaded from {host[:100]!r}: {reason}.", param, "invalid_image_url"
        ) from None


def split_allowed(url: str, param: str, allowed: frozenset[str]) -> tuple[SplitResult, str, int]:
    """Return an address in parts, its host and its port.

    Args:
        url: the address.
        param: field of the request that holds it, for error messages.
        allowed: hosts, as `name` for the usual ports or `name:port`.

    Raises:
        ApiError: if the host is not allowed, or the address is not valid.
    """
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").rstrip("."), parts.port
    except ValueError:
        raise ApiError(400, "The address of an image is not valid: check it.", param, "invalid_image_url") from None
    usual = PORTS[parts.scheme]
    name = host if port in (None, usual) else f"{host}:{port}"
    if name not in allowed or "@" in parts.netloc or not url.isascii() or any(letter <= " " for letter in url):
        raise ApiError(
            400,
            f"Images are not fetched from {name[:100]!r}: send a data: URL, or let the operator allow the host with "
            "--allowed_image_hosts.",
            param,
            "host_not_allowed",
        )
    return parts, host, port or usual


async def resolve(host: str, port: int) -> str | None:
    """Return an address of a host, or `None` if one of its addresses is not public.

    Raises:
        OSError: if the name is not known.
    """
    found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    addresses = [str(address[4][0]) for address in found]
    return addresses[0] if addresses and all(map(is_public, addresses)) else None


def is_public(address: str) -> bool:
    """Return whether an IP address belongs to the public Internet.

    Example:

    ```python
    >>> [is_public(address) for address in ("127.0.0.1", "169.254.169.254", "::ffff:10.0.0.1", "1.1.1.1")]
    [False, False, False, True]
    ```
    """
    ip = ipaddress.ip_address(address.partition("%")[0])
    if isinstance(ip, ipaddress.IPv6Address):
        embedded = ip.ipv4_mapped or ip.sixtofour or (ip.teredo and ip.teredo[1])
        if embedded:
            return is_public(str(embedded))
        if ip in ipaddress.ip_network("64:ff9b::/96"):  # an IPv4 address behind a translator
            return is_public(str(ipaddress.IPv4Address(int(ip) & 0xFFFFFFFF)))
    return ip.is_global and not ip.is_multicast and not ip.is_reserved


async def download(parts: SplitResult, host: str, port: int, address: str, max_bytes: int) -> bytes:
    """Download from an IP address what a host has at an address.

    Args:
        parts: the address in parts.
        host: name of the host, which the certificate must state.
        port: port of the host.
        address: IP address of the host.
        max_bytes: largest size.

    Raises:
        Exception: if it fails; the client raises errors of many types.
        ValueError: if the answer is not an image of at most this size.
    """
    netloc = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
    url = parts._replace(netloc=netloc, fragment="").geturl()
    named = host if port == PORTS[parts.scheme] else f"{host}:{port}"
    headers = {"Host": named, "Accept-Encoding": "identity", "User-Agent": "qformer-captioner"}
    content = bytearray()
    # Proxies of the environment would connect to another address.
    async with (
        httpx.AsyncClient(trust_env=False, follow_redirects=False, timeout=None) as client,
        client.stream("GET", url, headers=headers, extensions={"sni_hostname": host}) as response,
    ):
        if response.status_code != 200:
            raise ValueError(f"it answered with status {response.status_code}")
        if response.headers.get("content-encoding", "identity") != "identity":  # may be a decompression bomb
            raise ValueError("it answered with compressed content")
        async for part in response.aiter_raw():
            content += part
            if len(content) > max_bytes:
                raise ValueError(f"it has more than {max_bytes:,} bytes")
    return bytes(content)
