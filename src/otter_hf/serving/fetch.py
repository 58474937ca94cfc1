"""Reading what a URL in a request names, without becoming a way into the server's own network or disk.

A server that fetches what strangers name can be asked for `http://169.254.169.254/` or `file:///etc/passwd`
(server-side request forgery). Here a host is resolved once, all its addresses must be public, and the connection goes
to an address that was checked, so that a name cannot resolve to something else a moment later. Each redirect is
treated the same way.
"""

import contextlib
import http.client
import ipaddress
import socket
import ssl
import string
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote, unquote, urljoin, urlsplit

from ..pictures import decode_base64


MAX_REDIRECTS = 3
REDIRECTS = (301, 302, 303, 307, 308)
# IPv6 addresses that carry an IPv4 address inside, which could be a private one
IPV4_IN_IPV6 = ("::ffff:0:0/96", "64:ff9b::/96", "2002::/16", "2001::/32")
# and what else is reserved though not private: protocols of the IETF, documentation, relays of 6to4
RESERVED = tuple(map(ipaddress.ip_network, (*IPV4_IN_IPV6, "2001::/23", "3fff::/20", "192.88.99.0/24")))
# all that is given out of IPv6 so far
GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")


@dataclass(frozen=True)
class FetchPolicy:
    """
    What may be read.

    Args:
        http: fetch `http` and `https` addresses; `data:` needs no fetching and is always read.
        private_addresses: also those that are not public, such as 127.0.0.1 and 10.0.0.0/8.
        file_root: folder below which `file://` may read; None forbids it.
        max_bytes: of all that one request names.
        timeout: seconds for all that one request names, with redirects.
        max_fetches: addresses that one request may name.
    """

    http: bool = True
    private_addresses: bool = False
    file_root: Path | None = None
    max_bytes: int = 32 << 20
    timeout: float = 20.0
    max_fetches: int = 16


def read_url(url: str, name: str, policy: FetchPolicy) -> bytes:
    """
    The bytes of a `data:`, `http:`, `https:` or `file:` address.

    Args:
        url: the address.
        name: what to call it in an error.

    Raises:
        ValueError: naming it, if the policy forbids it or it cannot be read.
    """
    scheme = _scheme(url)
    try:
        if scheme == "data":
            data = decode_base64(url)
        elif scheme in ("http", "https") and policy.http:
            data = _fetch(url, policy)
        elif scheme == "file" and policy.file_root is not None:
            data = _read_file(url, policy)
        else:
            raise ValueError(f"this server reads no such address; send {_readable(policy)}")
    except (OSError, ValueError, http.client.HTTPException) as error:
        raise ValueError(f"{name} cannot be read: {error}.") from error
    if len(data) > policy.max_bytes:
        raise ValueError(f"{name} is larger than {policy.max_bytes} bytes; send a smaller one.")
    return data


def is_fetched(url: str) -> bool:
    """Whether an address is not itself what it stands for."""
    return _scheme(url) != "data"


def _scheme(url: str) -> str:
    return url[:16].partition(":")[0].lower()


def _readable(policy: FetchPolicy) -> str:
    schemes = ["data:...;base64,..."] + ["https://..."] * policy.http + ["file://..."] * (policy.file_root is not None)
    return " or ".join(schemes)


def _read_file(url: str, policy: FetchPolicy) -> bytes:
    root = policy.file_root.resolve()
    path = Path(unquote(urlsplit(url).path)).resolve()
    if not path.is_relative_to(root) or not path.is_file():
        raise ValueError("there is no such file among those this server may read")
    with path.open("rb") as file:
        return file.read(policy.max_bytes + 1)


def _fetch(url: str, policy: FetchPolicy) -> bytes:
    deadline = time.monotonic() + policy.timeout
    for _ in range(MAX_REDIRECTS + 1):
        status, location, data = _get(url, policy, deadline)
        if status not in REDIRECTS or location is None:
            if status != 200:
                raise ValueError(f"its server answered with status {status}")
            return data
        # headers come as Latin-1, whatever their bytes are
        url = urljoin(url, quote(location, safe=string.punctuation, encoding="iso-8859-1"))
    raise ValueError(f"it was redirected more than {MAX_REDIRECTS} times")


def _get(url: str, policy: FetchPolicy, deadline: float) -> tuple[int, str | None, bytes]:
    parts = urlsplit(url)  # with blanks and letters that a browser would escape
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError("it leads to something that is not http or https")
    port = parts.port or (443 if parts.scheme == "https" else 80)
    connection_class = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
    connection = connection_class(parts.hostname, port)
    sock = _connect(parts.hostname, port, policy, deadline)
    # a server that sends a byte now and then keeps every read within its own time limit; TLS has another socket
    watchdog = threading.Timer(max(deadline - time.monotonic(), 0), lambda: _shut_down(sock))
    watchdog.daemon = True
    watchdog.start()
    try:
        if parts.scheme == "https":
            sock = ssl.create_default_context().wrap_socket(sock, server_hostname=parts.hostname)
        connection.sock = sock
        path = quote((parts.path or "/") + (f"?{parts.query}" if parts.query else ""), safe=string.punctuation)
        connection.request("GET", path, headers={"Accept-Encoding": "identity", "User-Agent": "otter-hf"})
        response = connection.getresponse()
        data = response.read(policy.max_bytes + 1) if response.status == 200 else b""
        if time.monotonic() > deadline:
            raise TimeoutError("it took too long")
        return response.status, response.headers.get("Location"), data
    finally:
        watchdog.cancel()
        connection.close()
        sock.close()


def _connect(host: str, port: int, policy: FetchPolicy, deadline: float) -> socket.socket:
    """A connection to an address of `host`, all of which the policy allows."""
    addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    if not policy.private_addresses and not all(is_public(address[4][0]) for address in addresses):
        raise ValueError("its host is not on the public internet")
    error: OSError = OSError("its host has no address")
    for family, kind, protocol, _, address in addresses:
        sock = socket.socket(family, kind, protocol)
        sock.settimeout(max(deadline - time.monotonic(), 0.001))
        try:
            sock.connect(address)
            return sock
        except OSError as refused:
            sock.close()
            error = refused
    raise error


def is_public(address: str) -> bool:
    """Whether an IP address is one of the public internet, and no other address in disguise."""
    ip = ipaddress.ip_address(address.partition("%")[0])
    if ip.version == 6 and ip not in GLOBAL_UNICAST:
        return False
    reserved = any(ip in network for network in RESERVED if network.version == ip.version)
    return ip.is_global and not ip.is_multicast and not ip.is_reserved and not reserved


def _shut_down(sock: socket.socket) -> None:
    with contextlib.suppress(OSError):  # it may have ended by itself
        sock.shutdown(socket.SHUT_RDWR)
