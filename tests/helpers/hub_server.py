"""A small Hub on the loopback interface, for the real `huggingface_hub` client: repositories in memory, commits that
are applied whole or not at all, both upload modes, private repositories, and faults on request.

    with HubServer() as hub:
        hub.fault("put", 1)                  # the next LFS upload breaks in the middle
        subprocess.run([...], env=hub.environment(tmp_path))
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import re
import socket
import struct
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_" + "loopback0" * 4
#: What the Hub stores as LFS objects, whatever the size.
LFS_SUFFIXES = (".safetensors", ".png", ".bin")


@dataclass
class Repo:
    """Branches -> commit, commit -> files; a file is its content and whether it is an LFS object."""

    private: bool
    branches: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, tuple[bytes, bool]]] = field(default_factory=dict)
    messages: list[str] = field(default_factory=list)

    def commit(self, revision: str, files: dict[str, tuple[bytes, bool]], message: str) -> str:
        sha = hashlib.sha1(repr((len(self.commits), revision, message, files)).encode()).hexdigest()
        self.commits[sha], self.branches[revision] = files, sha
        self.messages.append(message)
        return sha

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return {path: content for path, (content, _) in self.commits[self.branches[revision]].items()}


class HubServer:
    """Serves until the `with` block ends. `tokens` maps a token to the user whose namespace it may write to.

    Attributes:
        repos: by id. requests: "METHOD path" of every request, in order. objects: LFS content by SHA-256.
        lfs_suffixes: endings of the files that are uploaded as LFS objects.
    """

    def __init__(self) -> None:
        self.tokens = {TOKEN: "user"}
        self.lfs_suffixes: tuple[str, ...] = LFS_SUFFIXES
        self.repos: dict[str, Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.requests: list[str] = []
        self._faults: dict[str, int] = {}
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def __enter__(self) -> HubServer:
        threading.Thread(target=self._server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def environment(self, home: Path, token: str | None = TOKEN) -> dict[str, str]:
        """Of a client process that can import this project, with the cache under `home`; None: not logged in."""
        ours = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "TRANSFORMERS_"))}
        root = str(Path(__file__).parents[2])
        hub = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_TOKEN": token or "", "HF_HUB_DISABLE_XET": "1"}
        return {**ours, **hub, "PYTHONPATH": root, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}

    def fault(self, kind: str, times: int) -> None:
        """Faults of the next `times` requests of a kind:
        put              an LFS upload is cut off in the middle
        commit           a commit request is cut off, not applied
        commit-response  a commit is applied, but the connection breaks before the answer
        commit-error     a commit request is answered with status 500, not applied
        concurrent       somebody else commits a weight file just before this commit
        """
        self._faults[kind] = times

    def take_fault(self, kind: str) -> bool:
        with self._lock:
            left = self._faults.get(kind, 0)
            self._faults[kind] = max(0, left - 1)
            return left > 0


class _Error(Exception):
    def __init__(self, status: int, message: str, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


class _CutError(Exception):
    """The connection breaks."""


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # header and content are two writes; the second would wait 40 ms

    def log_message(self, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET  # noqa: N815 - the base class looks for these names

    def _answer(self) -> None:
        url = urlsplit(self.path)
        self.query, path = parse_qs(url.query), unquote(url.path)
        self.hub.requests.append(f"{self.command} {path}")
        try:
            for pattern, method in _ROUTES:
                if match := re.fullmatch(pattern, f"{self.command} {path}"):
                    return method(self, *match.groups())
            raise _Error(404, f"no such endpoint: {self.command} {path}")
        except _Error as error:
            self._body()
            headers = {"X-Error-Message": str(error), **({"X-Error-Code": error.code} if error.code else {})}
            self._json({"error": str(error)}, error.status, headers)
        except _CutError:
            # Reset instead of an orderly end: close at once, with nothing sent.
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
            self.close_connection = True
            self.rfile, self.wfile = _Closed(), _Closed()

    # reading and writing

    def _body(self, at_most: int | None = None) -> bytes:
        """The whole request body, in one piece or chunked; or its first bytes."""
        if self.headers.get("Transfer-Encoding", "") != "chunked":
            length = int(self.headers.get("Content-Length") or 0)
            del self.headers["Content-Length"]
            return self.rfile.read(min(length, at_most) if at_most is not None else length)
        del self.headers["Transfer-Encoding"]
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
            if at_most is not None and len(body) >= at_most:
                return body
        self.rfile.readline()
        return body

    def _send(self, content: bytes, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, data: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        self._send(json.dumps(data).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    # who may do what

    def _user(self) -> str | None:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token and token not in self.hub.tokens:
            raise _Error(401, "Invalid credentials in Authorization header")
        return self.hub.tokens.get(token)

    def _writer(self, repo_id: str) -> str:
        user = self._user()
        if user is None:
            raise _Error(401, "Invalid username or password.")
        if repo_id.split("/")[0] != user and not self.query.get("create_pr"):
            raise _Error(403, f"you don't have the rights to write to {repo_id}")
        return user

    def _repo(self, repo_id: str) -> Repo:
        repo, user = self.hub.repos.get(repo_id), self._user()
        if repo is None or (repo.private and user != repo_id.split("/")[0]):
            raise _Error(404 if user else 401, "Repository not found", "RepoNotFound")
        return repo

    def _tree(self, repo: Repo, revision: str) -> tuple[str, dict[str, tuple[bytes, bool]]]:
        sha = repo.branches.get(revision, revision)
        if sha not in repo.commits:
            raise _Error(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return sha, repo.commits[sha]

    # endpoints

    def whoami(self) -> None:
        if (user := self._user()) is None:
            raise _Error(401, "Invalid username or password.")
        self._json({"type": "user", "name": user, "orgs": [], "auth": {"type": "access_token"}})

    def create(self) -> None:
        data = json.loads(self._body())
        repo_id = f"{data.get('organization') or self._user()}/{data['name']}"
        self._writer(repo_id)
        status = 409 if repo_id in self.hub.repos else 200
        if status == 200:
            repo = self.hub.repos[repo_id] = Repo(private=data.get("visibility") == "private")
            repo.commit("main", {".gitattributes": (b"*.safetensors filter=lfs\n", False)}, "initial commit")
        self._json({"url": f"{self.hub.url}/{repo_id}"}, status)

    def validate_yaml(self) -> None:
        content = json.loads(self._body())["content"]
        errors = [] if re.match(r"---\n.+?\n---\n", content, re.DOTALL) else [{"message": "no metadata"}]
        self._json({"errors": errors, "warnings": []}, 400 if errors else 200)

    def branch(self, repo_id: str, name: str) -> None:
        self._writer(repo_id)
        repo = self._repo(repo_id)
        self._body()
        if name in repo.branches:
            raise _Error(409, f"Reference already exists: {name}")
        repo.branches[name] = repo.branches["main"]
        self._json({})

    def info(self, repo_id: str, revision: str | None) -> None:
        repo = self._repo(repo_id)
        sha, files = self._tree(repo, revision or "main")
        siblings = [{"rfilename": path} for path in files]
        self._json({"id": repo_id, "modelId": repo_id, "sha": sha, "private": repo.private, "siblings": siblings})

    def tree(self, repo_id: str, revision: str, folder: str | None) -> None:
        _, files = self._tree(self._repo(repo_id), revision)
        entries = [
            {"type": "file", "path": path, "size": len(content), "oid": _oid(content, False)}
            | ({"lfs": {"oid": _oid(content, True), "size": len(content), "pointerSize": 130}} if lfs else {})
            for path, (content, lfs) in files.items()
            if path.startswith(f"{folder}/" if folder else "")
        ]
        if folder and not entries:
            raise _Error(404, f"{folder} does not exist on {revision}", "EntryNotFound")
        self._json(entries)

    def preupload(self, repo_id: str, revision: str) -> None:
        self._writer(repo_id)
        _, files = self._tree(self._repo(repo_id), revision)
        answer = []
        for file in json.loads(self._body())["files"]:
            lfs = file["path"].endswith(self.hub.lfs_suffixes)
            known = _oid(*files[file["path"]]) if file["path"] in files else None
            mode = "lfs" if lfs else "regular"
            answer.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": known})
        self._json({"files": answer})

    def lfs_batch(self, repo_id: str) -> None:
        self._writer(repo_id)
        objects = []
        for entry in json.loads(self._body())["objects"]:
            new = entry["oid"] not in self.hub.objects
            upload = {"upload": {"href": f"{self.hub.url}/lfs/{entry['oid']}", "header": {}}}
            objects.append({**entry, **({"actions": upload} if new else {})})
        self._json({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> None:
        if self.hub.take_fault("put"):
            self._body(at_most=100)
            raise _CutError
        content = self._body()
        if hashlib.sha256(content).hexdigest() != oid:
            raise _Error(400, f"content does not have the SHA-256 {oid}")
        self.hub.objects[oid] = content
        self._json({})

    def commit(self, repo_id: str, revision: str) -> None:
        self._writer(repo_id)
        repo = self._repo(repo_id)
        lines = [json.loads(line) for line in self._body().splitlines()]
        if self.hub.take_fault("commit"):
            raise _CutError
        if self.hub.take_fault("commit-error"):
            raise _Error(500, "Internal Server Error")
        if self.hub.take_fault("concurrent"):
            theirs = {"model-00001-of-00001.safetensors": (b"theirs", True)}
            repo.commit(revision, {**repo.commits[repo.branches[revision]], **theirs}, "somebody else")
        head, old = self._tree(repo, revision)
        header, files = lines[0]["value"], dict(old)
        if header.get("parentCommit", head) != head:
            raise _Error(412, "A commit has happened since. Please refresh and try again.")
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = (base64.b64decode(value["content"]), False)
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise _Error(400, f"LFS object of {value['path']} was never uploaded")
                files[value["path"]] = (self.hub.objects[value["oid"]], True)
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise _Error(400, f"unknown operation {line['key']}")
        proposal = bool(self.query.get("create_pr"))
        target = f"refs/pr/{1 + sum(b.startswith('refs/pr/') for b in repo.branches)}" if proposal else revision
        sha = repo.commit(target, files, header["summary"])
        if self.hub.take_fault("commit-response"):
            raise _CutError
        url = f"{self.hub.url}/{repo_id}"
        request = {"pullRequestUrl": f"{url}/discussions/{target.rpartition('/')[2]}"} if proposal else {}
        self._json({"success": True, "commitOid": sha, "commitUrl": f"{url}/commit/{sha}", **request})

    def resolve(self, repo_id: str, revision: str, path: str) -> None:
        sha, files = self._tree(self._repo(repo_id), revision)
        if path not in files:
            raise _Error(404, f"{path} does not exist on {revision}", "EntryNotFound")
        content, lfs = files[path]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{_oid(content, lfs)}"'}
        if lfs:
            headers |= {"X-Linked-ETag": headers["ETag"], "X-Linked-Size": str(len(content))}
        self._send(content, headers=headers)


class _Closed:
    """Stands for the streams of a connection that was cut."""

    closed = True

    def flush(self) -> None: ...
    def close(self) -> None: ...


def _oid(content: bytes, lfs: bool) -> str:
    if lfs:
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


_ID = r"([\w.-]+/[\w.-]+)"
_REVISION = r"(refs/pr/\d+|[^/]+)"
_ROUTES: list[tuple[str, Any]] = [
    (r"GET /api/whoami-v2", _Handler.whoami),
    (r"POST /api/repos/create", _Handler.create),
    (r"POST /api/validate-yaml", _Handler.validate_yaml),
    (rf"POST /api/models/{_ID}/branch/(.+)", _Handler.branch),
    (rf"GET /api/models/{_ID}(?:/revision/(.+))?", _Handler.info),
    (rf"GET /api/models/{_ID}/tree/{_REVISION}(?:/(.+))?", _Handler.tree),
    (rf"POST /api/models/{_ID}/preupload/(.+)", _Handler.preupload),
    (rf"POST /{_ID}.git/info/lfs/objects/batch", _Handler.lfs_batch),
    (r"PUT /lfs/([0-9a-f]{64})", _Handler.lfs_put),
    (rf"POST /api/models/{_ID}/commit/(.+)", _Handler.commit),
    (rf"(?:GET|HEAD) /{_ID}/resolve/{_REVISION}/(.+)", _Handler.resolve),
]
