"""
A Hugging Face Hub in memory, for tests: `with HubDouble() as hub` serves `hub.url` on this machine only.

It answers what `huggingface_hub` (without xet: `HF_HUB_DISABLE_XET=1`) asks for when a repository is created, files
are uploaded and files are downloaded: create, pre-upload, LFS, commit, repository info, file tree, resolve. One branch
per repository, no pull requests, one user and one token. The endpoint is read when huggingface_hub is imported, so use
it from another process, started with `environment()`.
"""

import base64
import hashlib
import json
import os
import re
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


LFS_SUFFIXES = (".safetensors", ".bin", ".pt", ".parquet", ".arrow")
LFS_FROM_BYTES = 1 << 20


@dataclass
class StoredFile:
    """One version of a file; `sha256` is set for those kept in LFS."""

    data: bytes
    sha256: str | None = None

    @property
    def git_id(self) -> str:
        """As git names what it stores: the file, or for LFS a pointer to it."""
        content = self.data
        if self.sha256:
            pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{self.sha256}\nsize {len(self.data)}\n"
            content = pointer.encode()
        return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()

    def describe(self, path: str) -> dict:
        entry = {"type": "file", "path": path, "size": len(self.data), "oid": self.git_id}
        if self.sha256:
            entry["lfs"] = {"oid": self.sha256, "size": len(self.data), "pointerSize": 130}
        return entry


@dataclass
class Repository:
    """A model repository: commits, newest last."""

    name: str
    private: bool = False
    commits: list[tuple[str, str, dict[str, StoredFile]]] = field(default_factory=list)

    def commit(self, files: dict[str, StoredFile], title: str) -> str:
        state = json.dumps([title, len(self.commits), sorted((path, file.git_id) for path, file in files.items())])
        revision = hashlib.sha1(state.encode()).hexdigest()
        self.commits.append((revision, title, files))
        return revision

    def at(self, revision: str) -> tuple[str, dict[str, StoredFile]]:
        for name, _, files in reversed(self.commits):
            if unquote(revision) in ("main", name):
                return name, files
        raise HubError(404, "RevisionNotFound", f"Invalid rev id: {revision}")


@dataclass
class Fault:
    """The next `times` requests of a method and path (a regular expression) fail: see `HubDouble.fail`."""

    method: str
    path: str
    status: int | None
    times: int
    text: str


class HubError(Exception):
    """An answer other than success, in the Hub's words."""

    def __init__(self, status: int, code: str, message: str):
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class HubDouble(ThreadingHTTPServer):
    """The server; `repositories`, by name, can be looked into, and `requests` holds each method and path asked for."""

    daemon_threads = True

    def __init__(self, user: str = "tester", token: str = "hf_test"):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.user, self.token = user, token
        self.repositories: dict[str, Repository] = {}
        self.lfs: dict[str, bytes] = {}
        self.requests: list[tuple[str, str]] = []
        self.faults: list[Fault] = []
        self.lock = threading.RLock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def environment(self, cache) -> dict[str, str]:
        """Environment for a process that shall take this server for the Hub, with its cache in the folder `cache`."""
        variables = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "TRANSFORMERS_"))}
        return variables | {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(cache),
            "HF_TOKEN": self.token,
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "NO_PROXY": "127.0.0.1",
        }

    def fail(self, method: str, path: str, status: int | None = 503, times: int = 1, text: str = "") -> None:
        """
        Lets requests fail: with a status, or with None by closing the connection without an answer.

        Args:
            method, path: of the requests, the path as a regular expression.
            times: how many of them.
            text: that the body must contain.
        """
        self.faults.append(Fault(method, path, status, times, text))

    def take_fault(self, method: str, path: str, body: bytes) -> "Fault | None":
        with self.lock:
            for fault in self.faults:
                if fault.times and fault.method == method and re.search(fault.path, path):
                    if fault.text.encode() in body:
                        fault.times -= 1
                        return fault
        return None

    def __enter__(self):
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *exception):
        self.shutdown()
        self.server_close()


_ROUTES: list[tuple[str, re.Pattern, Callable]] = []
_REPOSITORY = r"/api/(?:models|datasets)/(?P<name>[^/]+/[^/]+)"


def _route(method: str, pattern: str):
    def register(function):
        _ROUTES.append((method, re.compile(pattern + "$"), function))
        return function

    return register


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: HubDouble

    def log_message(self, *args):
        pass

    def _answer(self):
        url = urlsplit(self.path)
        self.query, self.body = parse_qs(url.query), self._read_body()
        self.server.requests.append((self.command, self.path))
        fault = self.server.take_fault(self.command, self.path, self.body)
        try:
            if fault is not None and fault.status is None:
                self.close_connection = True
                return None
            if fault is not None:
                raise HubError(fault.status, "Unavailable", "The Hub is out of order.")
            for method, pattern, function in _ROUTES:
                match = pattern.match(url.path)
                if match and (method == self.command or (method, self.command) == ("GET", "HEAD")):
                    with self.server.lock:
                        return function(self, self.server, **match.groupdict())
            raise HubError(404, "NotImplemented", f"the double does not answer {self.command} {url.path}")
        except HubError as error:
            headers = {"X-Error-Code": error.code, "X-Error-Message": error.message}
            return self.reply({"error": error.message}, status=error.status, headers=headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _answer

    def _read_body(self) -> bytes:
        if "chunked" not in self.headers.get("Transfer-Encoding", ""):
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def reply(self, content: bytes | dict | list, status: int = 200, headers: dict | None = None):
        headers = dict(headers or {})
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
            headers["Content-Type"] = "application/json"
        self.send_response(status)
        for key, value in {**headers, "Content-Length": len(content)}.items():
            self.send_header(key, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    @property
    def knows_token(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.server.token}"

    def require_token(self):
        if not self.knows_token:
            raise HubError(401, "Unauthorized", "Invalid username or password.")

    def repository(self, name: str) -> Repository:
        repository = self.server.repositories.get(name)
        if repository is None or (repository.private and not self.knows_token):
            raise HubError(404 if self.knows_token else 401, "RepoNotFound", "Repository not found")
        return repository


@_route("GET", "/api/whoami-v2")
def _whoami(handler, hub):
    handler.require_token()
    auth = {"type": "access_token", "accessToken": {"displayName": "test", "role": "write"}}
    handler.reply({"type": "user", "id": "0", "name": hub.user, "fullname": hub.user, "orgs": [], "auth": auth})


@_route("POST", "/api/repos/create")
def _create(handler, hub):
    handler.require_token()
    wanted = json.loads(handler.body)
    name = f"{wanted.get('organization') or hub.user}/{wanted['name']}"
    url = f"{hub.url}/{name}"
    if name in hub.repositories:
        return handler.reply({"error": "You already created this repo", "url": url}, status=409)
    private = wanted.get("visibility") == "private" or bool(wanted.get("private"))
    hub.repositories[name] = Repository(name, private)
    hub.repositories[name].commit({}, "initial commit")
    return handler.reply({"url": url, "name": name, "id": "0"})


@_route("POST", "/api/validate-yaml")
def _validate_card(handler, hub):
    handler.reply({"errors": [], "warnings": []})


@_route("POST", _REPOSITORY + "/preupload/(?P<revision>[^/]+)")
def _preupload(handler, hub, name, revision):
    handler.require_token()
    _, files = handler.repository(name).at(revision)
    answers = []
    for entry in json.loads(handler.body)["files"]:
        path = entry["path"]
        binary = b"\0" in base64.b64decode(entry["sample"])
        lfs = binary or entry["size"] > LFS_FROM_BYTES or path.endswith(LFS_SUFFIXES)
        known = files.get(path)
        answer = {"path": path, "uploadMode": "lfs" if lfs else "regular", "shouldIgnore": False}
        answers.append(answer | {"oid": known and (known.sha256 or known.git_id)})
    handler.reply({"files": answers})


@_route("POST", r"/(?P<name>.+)\.git/info/lfs/objects/batch")
def _lfs_batch(handler, hub, name):
    handler.require_token()
    answers = []
    for entry in json.loads(handler.body)["objects"]:
        answer = {"oid": entry["oid"], "size": entry["size"]}
        if entry["oid"] not in hub.lfs:
            answer["actions"] = {
                "upload": {"href": f"{hub.url}/lfs/{entry['oid']}", "header": {}},
                "verify": {"href": f"{hub.url}/lfs-verify", "header": {}},
            }
        answers.append(answer)
    handler.reply({"transfer": "basic", "objects": answers})


@_route("PUT", "/lfs/(?P<sha256>[0-9a-f]{64})")
def _lfs_put(handler, hub, sha256):
    if hashlib.sha256(handler.body).hexdigest() != sha256:
        raise HubError(400, "LfsMismatch", "the upload does not have the checksum it was announced with")
    hub.lfs[sha256] = handler.body
    handler.reply(b"")


@_route("POST", "/lfs-verify")
def _lfs_verify(handler, hub):
    entry = json.loads(handler.body)
    complete = len(hub.lfs.get(entry["oid"], b"")) == entry["size"]
    handler.reply({}, status=200 if complete else 404)


@_route("POST", _REPOSITORY + "/commit/(?P<revision>[^/]+)")
def _commit(handler, hub, name, revision):
    handler.require_token()
    repository = handler.repository(name)
    parent, files = repository.at(revision)
    files, title = dict(files), "commit"
    for line in handler.body.splitlines():
        entry = json.loads(line)
        kind, value = entry["key"], entry["value"]
        if kind == "header":
            title = value["summary"]
            if value.get("parentCommit") not in (None, parent):
                raise HubError(412, "Precondition", "A commit has happened since. Please refresh and try again.")
        elif kind == "file":
            files[value["path"]] = StoredFile(base64.b64decode(value["content"]))
        elif kind == "lfsFile":
            if value["oid"] not in hub.lfs:
                raise HubError(400, "LfsMissing", f"LFS object {value['oid']} not uploaded")
            files[value["path"]] = StoredFile(hub.lfs[value["oid"]], value["oid"])
        elif kind == "deletedFile":
            files.pop(value["path"])
        else:
            raise HubError(400, "NotImplemented", f"the double cannot commit a {kind}")
    new = repository.commit(files, title)
    url = f"{hub.url}/{name}/commit/{new}"
    handler.reply({"success": True, "commitOid": new, "commitUrl": url, "hookOutput": ""})


@_route("GET", _REPOSITORY + "(/revision/(?P<revision>[^/]+))?")
def _info(handler, hub, name, revision):
    repository = handler.repository(name)
    commit, files = repository.at(revision or "main")
    now = datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%S.%fZ")
    handler.reply(
        {
            "_id": "0",
            "id": name,
            "modelId": name,
            "author": name.split("/")[0],
            "sha": commit,
            "private": repository.private,
            "disabled": False,
            "gated": False,
            "downloads": 0,
            "likes": 0,
            "tags": [],
            "lastModified": now,
            "createdAt": now,
            "siblings": [{"rfilename": path} for path in sorted(files)],
        }
    )


@_route("GET", _REPOSITORY + "/tree/(?P<revision>[^/]+)(/(?P<folder>.*))?")
def _tree(handler, hub, name, revision, folder):
    _, files = handler.repository(name).at(revision)
    prefix = f"{unquote(folder).strip('/')}/" if folder else ""
    recursive = handler.query.get("recursive", ["false"])[0].lower() in ("true", "1")
    entries, folders = [], set()
    for path, file in sorted(files.items()):
        if not path.startswith(prefix):
            continue
        parents = path.removeprefix(prefix).split("/")[:-1]
        depth = len(parents) if recursive else min(1, len(parents))
        folders |= {prefix + "/".join(parents[: i + 1]) for i in range(depth)}
        if recursive or not parents:
            entries.append(file.describe(path))
    if prefix and not entries and not folders:
        raise HubError(404, "EntryNotFound", f"{folder} does not exist on {revision}")
    empty = hashlib.sha1(b"").hexdigest()
    handler.reply([{"type": "directory", "path": path, "size": 0, "oid": empty} for path in sorted(folders)] + entries)


@_route("POST", _REPOSITORY + "/paths-info/(?P<revision>[^/]+)")
def _paths_info(handler, hub, name, revision):
    _, files = handler.repository(name).at(revision)
    is_json = handler.body[:1] == b"{"
    paths = json.loads(handler.body)["paths"] if is_json else parse_qs(handler.body.decode())["paths"]
    handler.reply([files[path].describe(path) for path in paths if path in files])


@_route("GET", _REPOSITORY + "/refs")
def _refs(handler, hub, name):
    commit, _ = handler.repository(name).at("main")
    branch = {"name": "main", "ref": "refs/heads/main", "targetCommit": commit}
    handler.reply({"branches": [branch], "tags": [], "converts": []})


@_route("GET", r"/(?:datasets/)?(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
def _resolve(handler, hub, name, revision, path):
    commit, files = handler.repository(name).at(revision)
    headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
    file = files.get(unquote(path))
    if file is None:
        headers |= {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"}
        return handler.reply({"error": "Entry not found"}, status=404, headers=headers)
    etag = f'"{file.sha256 or file.git_id}"'
    headers |= {"ETag": etag, "Content-Type": "application/octet-stream"}
    if file.sha256:
        headers |= {"X-Linked-ETag": etag, "X-Linked-Size": len(file.data)}
    wanted = re.match(r"bytes=(\d+)-(\d*)", handler.headers.get("Range", ""))
    if wanted and handler.command == "GET":
        start, end = int(wanted[1]), min(int(wanted[2] or len(file.data) - 1), len(file.data) - 1)
        headers["Content-Range"] = f"bytes {start}-{end}/{len(file.data)}"
        return handler.reply(file.data[start : end + 1], status=206, headers=headers)
    return handler.reply(file.data, headers=headers)
