"""What a server reads for strangers, and what it does not."""

import base64
import contextlib
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace

import pytest

from otter_hf.serving import fetch
from otter_hf.serving.fetch import FetchPolicy, is_public, read_url


HERE = FetchPolicy(private_addresses=True, max_bytes=1000, timeout=2)


class Pages(BaseHTTPRequestHandler):
    """A web server with something to offer and some traps."""

    def do_GET(self):
        name, _, rest = self.path.lstrip("/").partition("/")
        if name == "redirect":
            self.send_response(302)
            self.send_header("Location", rest)
            self.end_headers()
            return
        if name == "moved":
            self.send_response(301)
            self.send_header("Location", "/page/köln".encode().decode("latin-1"))
            self.end_headers()
            return
        self.send_response(200 if name in ("page", "large", "drip", "endless") else 404)
        self.end_headers()
        if name == "page":
            self.wfile.write(b"content")
        if name == "large":
            self.wfile.write(b"a" * 5000)
        if name == "drip":
            for _ in range(100):
                self.wfile.write(b"a")
                self.wfile.flush()
                time.sleep(0.1)
        if name == "endless":
            Pages.sent = 0
            with contextlib.suppress(OSError):  # nobody is there any more
                while Pages.sent < 300:
                    self.wfile.write(b"a")
                    Pages.sent += 1
                    time.sleep(0.05)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def site():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Pages)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("93.184.216.34", True),
        ("2606:2800:220:1:248:1893:25c8:1946", True),
        ("4000::1", False),
        ("5f00::1", False),
        ("3fff::1", False),
        ("2001:1::1", False),
        ("2001:db8::1", False),
        ("100::1", False),
        ("64:ff9b:1::7f00:1", False),
        ("192.88.99.1", False),
        ("240.0.0.1", False),
        ("127.0.0.1", False),
        ("10.1.2.3", False),
        ("172.16.0.1", False),
        ("192.168.1.1", False),
        ("169.254.169.254", False),
        ("100.64.0.1", False),
        ("0.0.0.0", False),
        ("224.0.0.1", False),
        ("::1", False),
        ("::", False),
        ("fe80::1%eth0", False),
        ("fd00::1", False),
        ("ff02::1", False),
        ("::ffff:127.0.0.1", False),
        ("64:ff9b::a00:1", False),
        ("2002:7f00:1::", False),
    ],
)
def test_public_addresses(address, public):
    assert is_public(address) == public


def test_pages_and_redirects(site):
    assert read_url(f"{site}/page", "it", HERE) == b"content"
    assert read_url(f"{site}/redirect/{site}/page", "it", HERE) == b"content"
    # with letters that browsers escape
    assert read_url(f"{site}/page/ä b?c=ö d", "it", HERE) == read_url(f"{site}/moved", "it", HERE) == b"content"


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("nothing", "answered with status 404"),
        ("large", "larger than 1000 bytes"),
        ("redirect//redirect//redirect//redirect//redirect//page", "redirected more than 3 times"),
        ("redirect/file:///etc/passwd", "not http or https"),
        ("drip", "cannot be read"),
    ],
)
def test_pages_that_are_refused(path, message, site):
    with pytest.raises(ValueError, match=message):
        read_url(f"{site}/{path}", "it", HERE)


def test_a_slow_site_is_left_through_tls_too(site, monkeypatch):
    class Context:
        def wrap_socket(self, sock, server_hostname):
            """As TLS does: the socket of before is none any more."""
            limit = sock.gettimeout()
            wrapped = socket.socket(fileno=sock.detach())
            wrapped.settimeout(limit)
            return wrapped

    monkeypatch.setattr(fetch, "ssl", SimpleNamespace(create_default_context=Context))
    policy = FetchPolicy(private_addresses=True, timeout=0.5)
    with pytest.raises(ValueError, match="it cannot be read"):
        read_url(f"{site.replace('http:', 'https:')}/endless", "it", policy)
    assert Pages.sent < 300


def test_private_addresses_are_not_reached(site):
    for url in (site, site.replace("127.0.0.1", "localhost"), site.replace("127.0.0.1", "2130706433")):
        with pytest.raises(ValueError, match="it cannot be read: its host is not on the public internet"):
            read_url(f"{url}/page", "it", FetchPolicy())


def test_a_redirect_does_not_escape(site, monkeypatch):
    """A public page must not send the server to a private one."""
    monkeypatch.setattr(fetch, "is_public", lambda address: address == "127.0.0.1")
    policy = FetchPolicy(timeout=2)
    assert read_url(f"{site}/page", "it", policy) == b"content"
    inside = site.replace("127.0.0.1", "127.0.0.2")
    with pytest.raises(ValueError, match="not on the public internet"):
        read_url(f"{site}/redirect/{inside}/page", "it", policy)


def test_a_name_is_resolved_once(site, monkeypatch):
    """A name whose second answer is a private address is connected to by its first, which was checked."""
    port = int(site.rpartition(":")[2])
    answers = iter(["127.0.0.1", "127.0.0.2"])
    asked = []

    def getaddrinfo(host, *args, **kwargs):
        asked.append(host)
        return [(2, 1, 6, "", (next(answers), port))]

    monkeypatch.setattr(fetch.socket, "getaddrinfo", getaddrinfo)
    monkeypatch.setattr(fetch, "is_public", lambda address: address == "127.0.0.1")
    assert read_url(f"http://rebound.example:{port}/page", "it", FetchPolicy(timeout=2)) == b"content"
    assert asked == ["rebound.example"]


def test_every_address_of_a_name_must_be_public(monkeypatch):
    both = [(2, 1, 6, "", ("93.184.216.34", 80)), (2, 1, 6, "", ("10.0.0.1", 80))]
    monkeypatch.setattr(fetch.socket, "getaddrinfo", lambda *args, **kwargs: both)
    with pytest.raises(ValueError, match="not on the public internet"):
        read_url("http://both.example/", "it", FetchPolicy())


def test_files_only_below_the_folder_allowed(tmp_path):
    allowed = tmp_path / "allowed"
    allowed.mkdir()
    (allowed / "a b.txt").write_bytes(b"inside")
    (tmp_path / "secret").write_bytes(b"outside")
    (allowed / "link").symlink_to(tmp_path / "secret")
    policy = FetchPolicy(file_root=allowed)
    assert read_url(f"file://{allowed}/a%20b.txt", "it", policy) == b"inside"
    for path in (tmp_path / "secret", allowed / ".." / "secret", allowed / "link", allowed / "none", allowed):
        with pytest.raises(ValueError, match="no such file among those this server may read"):
            read_url(f"file://{path}", "it", policy)
    with pytest.raises(ValueError, match="reads no such address"):
        read_url(f"file://{allowed}/a%20b.txt", "it", FetchPolicy())


def test_data(monkeypatch):
    data = "data:text/plain;base64," + base64.b64encode(b"hello").decode()
    assert read_url(data, "it", FetchPolicy(http=False)) == b"hello"
    with pytest.raises(ValueError, match="it is larger than 3 bytes"):
        read_url(data, "it", FetchPolicy(max_bytes=3))
    with pytest.raises(ValueError, match="reads no such address; send data:"):
        read_url("https://example.com/a.png", "it", FetchPolicy(http=False))
