"""A Hub on the loopback interface: as much of its HTTP API as `huggingface_hub` uses to push a model and to load it.

Repositories are kept in memory. Large files go through git-LFS (batch, upload, verify) and are downloaded from another
host name than the API's, as from the Hub's content network.
"""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml


WRITE, READ = "hf_write", "hf_read"
"""Tokens: of the user `me`, who may write, and of one who may only read."""

LARGE = (".safetensors", ".bin", ".pt", ".pth", ".png")
LARGEST_BODY = 1 << 28
PIPELINE_TAGS = {"text-to-image", "image-to-image", "text-generation"}
RELATIONS = {"adapter", "finetune", "merge", "quantized"}
HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


@dataclass
class File:
    """A file of a commit."""

    content: bytes
    large: bool

    @property
    def oid(self) -> str:
        """The SHA-256 of a large file, the hash that git gives to any other."""
        if self.large:
            return hashlib.sha256(self.content).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass
class Repository:
    """Branches with their commits, and the messages of all commits in order."""

    private: bool
    branches: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})
    commits: dict[str, dict[str, File]] = field(default_factory=lambda: {"0" * 40: {}})
    messages: list[str] = field(default_factory=list)


class Answer(Exception):
    """An answer that is no success."""

    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code


@dataclass
class Fault:
    """What happens to requests that match, so many times: a status, or (`None`) a lost connection."""

    method: str
    path: str
    status: int | None
    times: int


class HubServer(ThreadingHTTPServer):
    """The server; `with HubServer.running() as hub:` has it at `hub.endpoint`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_port}"
        self.repositories: dict[str, Repository] = {}
        self.large_files: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.faults: list[Fault] = []
        self.tokens = {WRITE: "me", READ: "guest"}
        self.lock = threading.RLock()
        self.before_commit: Callable[[], Any] = lambda: None

    @classmethod
    @contextmanager
    def running(cls) -> Iterator["HubServer"]:
        with cls() as server:
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
            thread.start()
            try:
                yield server
            finally:
                server.shutdown()
                thread.join(timeout=10)

    def fail(self, method: str, path: str, status: int | None, times: int = 1000) -> None:
        """Answer the next requests whose path matches with `status`; `None` breaks the connection in the middle."""
        self.faults.append(Fault(method, path, status, times))

    def files(self, repo_id: str, revision: str = "main") -> dict[str, bytes]:
        """What a repository holds."""
        repository = self.repositories[repo_id]
        return {path: file.content for path, file in repository.commits[repository.branches[revision]].items()}

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that goes away is no error here."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = 30
    server: HubServer

    def log_message(self, *_: Any) -> None:
        """Keep the tests' output clean."""

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        url = urlsplit(self.path)
        self.server.requests.append(f"{self.command} {url.path}")
        fault = next((f for f in self.server.faults if f.method == self.command and re.search(f.path, url.path)), None)
        if fault is not None and fault.times > 0:
            fault.times -= 1
            if fault.status is None:
                self.rfile.read(1)  # it has begun to send
                self.close_connection = True
                self.connection.close()
                return
            self._body()
            return self._send(
                fault.status, {"error": "a fault of the test"}, {"X-Error-Message": "a fault of the test"}
            )
        body = self._body()
        try:
            for method, pattern, handle in ROUTES:
                match = re.fullmatch(pattern, url.path)
                if match and self.command in method.split():
                    with self.server.lock:
                        arguments = {name: value and unquote(value) for name, value in match.groupdict().items()}
                        status, payload, headers = handle(self, body, parse_qs(url.query), **arguments)
                    return self._send(status, payload, headers)
            raise Answer(404, f"No route for {self.command} {url.path}")
        except Answer as answer:
            headers = {"X-Error-Message": answer.message, **({"X-Error-Code": answer.code} if answer.code else {})}
            self._send(answer.status, {"error": answer.message, "errors": [{"message": answer.message}]}, headers)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = []
            while size := int(self.rfile.readline(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        length = int(self.headers.get("Content-Length") or 0)
        assert length <= LARGEST_BODY
        return self.rfile.read(length)

    def _send(self, status: int, payload: Any, headers: dict[str, str]) -> None:
        content = payload if isinstance(payload, bytes) else json.dumps(payload).encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": "application/json",
            **headers,
            "Content-Length": str(len(content)),
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    # -------------------------------------------------------------------------------------- who asks, and for what

    def user(self) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if not token:
            return None
        if token not in self.server.tokens:
            raise Answer(401, "Invalid credentials in Authorization header")
        return self.server.tokens[token]

    def writer(self, repo_id: str) -> Repository:
        user = self.user()
        if user is None:
            raise Answer(401, "Invalid username or password.")
        repository = self.reader(repo_id)
        if user != repo_id.split("/")[0]:
            raise Answer(403, f"You don't have the rights to write to {repo_id}")
        return repository

    def reader(self, repo_id: str) -> Repository:
        repository = self.server.repositories.get(repo_id)
        if repository is None or (repository.private and self.user() != repo_id.split("/")[0]):
            raise Answer(404 if self.user() else 401, "Repository not found", "RepoNotFound")
        return repository

    def commit(self, repository: Repository, revision: str) -> tuple[str, dict[str, File]]:
        oid = repository.branches.get(revision, revision)
        if oid not in repository.commits:
            raise Answer(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return oid, repository.commits[oid]

    # ------------------------------------------------------------------------------------------------- the routes

    def whoami(self, body: bytes, query: dict) -> tuple[int, Any, dict]:
        user = self.user()
        if user is None:
            raise Answer(401, "Invalid username or password.")
        return 200, {"type": "user", "name": user, "orgs": [], "auth": {"type": "access_token"}}, {}

    def create(self, body: bytes, query: dict) -> tuple[int, Any, dict]:
        request, user = json.loads(body), self.user()
        if user is None:
            raise Answer(401, "Invalid username or password.")
        repo_id = f"{request.get('organization') or user}/{request['name']}"
        if not repo_id.startswith(f"{user}/") or self.headers["Authorization"].endswith(READ):
            raise Answer(403, f"You don't have the rights to create a model under {repo_id.split('/')[0]}")
        known = repo_id in self.server.repositories
        if not known:
            self.server.repositories[repo_id] = Repository(request.get("visibility") == "private")
        return 409 if known else 200, {"url": f"{self.server.endpoint}/{repo_id}", "name": repo_id}, {}

    def create_branch(self, body: bytes, query: dict, repo: str, rev: str) -> tuple[int, Any, dict]:
        repository = self.writer(repo)
        if rev in repository.branches:
            raise Answer(409, f"Reference already exists: {rev}")
        repository.branches[rev] = repository.branches["main"]
        return 200, {}, {}

    def info(self, body: bytes, query: dict, repo: str, rev: str | None = None) -> tuple[int, Any, dict]:
        repository = self.reader(repo)
        oid, files = self.commit(repository, rev or "main")
        siblings = [{"rfilename": path} for path in sorted(files)]
        card = yaml.safe_load(files["README.md"].content.split(b"---")[1]) if "README.md" in files else {}
        about = {"id": repo, "modelId": repo, "sha": oid, "private": repository.private, "siblings": siblings}
        return 200, {**about, "tags": card.get("tags", []), "cardData": card}, {}

    def tree(self, body: bytes, query: dict, repo: str, rev: str, path: str | None = None) -> tuple[int, Any, dict]:
        _, files = self.commit(self.reader(repo), rev)
        below = {name: file for name, file in files.items() if not path or name.startswith(f"{path}/")}
        return 200, [self.entry(name, file) for name, file in sorted(below.items())], {}

    def paths_info(self, body: bytes, query: dict, repo: str, rev: str) -> tuple[int, Any, dict]:
        _, files = self.commit(self.reader(repo), rev)
        try:
            wanted = json.loads(body)["paths"]
        except json.JSONDecodeError:
            wanted = parse_qs(body.decode())["paths"]
        return 200, [self.entry(name, files[name]) for name in wanted if name in files], {}

    @staticmethod
    def entry(path: str, file: File) -> dict[str, Any]:
        about = {"type": "file", "path": path, "size": len(file.content), "oid": file.oid[:40]}
        return about | (
            {"lfs": {"oid": file.oid, "size": len(file.content), "pointerSize": 130}} if file.large else {}
        )

    def validate(self, body: bytes, query: dict) -> tuple[int, Any, dict]:
        problems = metadata_problems(json.loads(body)["content"])
        return 400 if problems else 200, {"errors": [{"message": problem} for problem in problems], "warnings": []}, {}

    def preupload(self, body: bytes, query: dict, repo: str, rev: str) -> tuple[int, Any, dict]:
        _, files = self.commit(self.writer(repo), rev)
        answers = []
        for file in json.loads(body)["files"]:
            path, known = file["path"], files.get(file["path"])
            mode = "lfs" if path.endswith(LARGE) else "regular"
            answers.append(
                {"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": known.oid if known else None}
            )
        return 200, {"files": answers}, {}

    def lfs_batch(self, body: bytes, query: dict, repo: str) -> tuple[int, Any, dict]:
        self.writer(repo)
        request, objects = json.loads(body), []
        assert request["operation"] == "upload" and request["hash_algo"] == "sha256"
        for item in request["objects"]:
            oid = item["oid"]
            actions = {
                "upload": {"href": f"{self.server.endpoint}/lfs/{oid}"},
                "verify": {"href": f"{self.server.endpoint}/{repo}.git/info/lfs/verify"},
            }
            objects.append({**item, **({} if oid in self.server.large_files else {"actions": actions})})
        return 200, {"transfer": "basic", "objects": objects}, {}

    def lfs_upload(self, body: bytes, query: dict, oid: str) -> tuple[int, Any, dict]:
        if hashlib.sha256(body).hexdigest() != oid:
            raise Answer(400, "The content has another hash")
        self.server.large_files[oid] = body
        return 200, b"", {}

    def lfs_verify(self, body: bytes, query: dict, repo: str) -> tuple[int, Any, dict]:
        self.writer(repo)
        request = json.loads(body)
        if len(self.server.large_files.get(request["oid"], b"")) != request["size"]:
            raise Answer(404, "The object is not there")
        return 200, {}, {}

    def new_commit(self, body: bytes, query: dict, repo: str, rev: str) -> tuple[int, Any, dict]:
        repository = self.writer(repo)
        self.server.before_commit()
        if rev not in repository.branches:
            raise Answer(404, f"Invalid rev id: {rev}", "RevisionNotFound")
        files = dict(repository.commits[repository.branches[rev]])
        header, *operations = [json.loads(line) for line in body.splitlines()]
        for operation in operations:
            kind, value = operation["key"], operation["value"]
            path = value["path"]
            if kind == "file":
                files[path] = File(base64.b64decode(value["content"]), large=False)
            elif kind == "lfsFile":
                files[path] = File(self.server.large_files[value["oid"]], large=True)
            elif files.pop(path, None) is None:
                raise Answer(404, f"A file with this name doesn't exist: {path}", "EntryNotFound")
        number = len(repository.commits)
        oid = hashlib.sha1(f"{repo} {number}".encode()).hexdigest()
        repository.commits[oid], repository.branches[rev] = files, oid
        repository.messages.append(header["value"]["summary"])
        return 200, {"commitUrl": f"{self.server.endpoint}/{repo}/commit/{oid}", "commitOid": oid, "success": True}, {}

    def resolve(self, body: bytes, query: dict, repo: str, rev: str, path: str) -> tuple[int, Any, dict]:
        oid, files = self.commit(self.reader(repo), rev)
        headers = {"X-Repo-Commit": oid}
        if path not in files:
            raise Answer(404, "Entry not found", "EntryNotFound")
        file = files[path]
        if not file.large:
            return 200, file.content, {**headers, "ETag": f'"{file.oid}"', "Content-Type": "text/plain"}
        linked = {"X-Linked-Etag": f'"{file.oid}"', "X-Linked-Size": str(len(file.content))}
        return (
            302,
            b"",
            {**headers, **linked, "Location": f"http://localhost:{self.server.server_port}/cdn/{file.oid}"},
        )

    def content_network(self, body: bytes, query: dict, oid: str) -> tuple[int, Any, dict]:
        if "Authorization" in self.headers:
            raise Answer(400, "A token was sent to another host")
        return 200, self.server.large_files[oid], {"Content-Type": "application/octet-stream"}

    def nothing(self, body: bytes, query: dict) -> tuple[int, Any, dict]:
        return 200, {}, {}


REPO, REV = r"(?P<repo>[^/]+/[^/]+)", r"(?P<rev>[^/]+)"
ROUTES: list[tuple[str, str, Callable]] = [
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("POST", f"/api/models/{REPO}/branch/{REV}", Handler.create_branch),
    ("POST", f"/api/models/{REPO}/preupload/{REV}", Handler.preupload),
    ("POST", f"/api/models/{REPO}/commit/{REV}", Handler.new_commit),
    ("POST", f"/api/models/{REPO}/paths-info/{REV}", Handler.paths_info),
    ("GET", f"/api/models/{REPO}", Handler.info),
    ("GET", f"/api/models/{REPO}/revision/{REV}", Handler.info),
    ("GET", f"/api/models/{REPO}/tree/{REV}", Handler.tree),
    ("GET", f"/api/models/{REPO}/tree/{REV}/(?P<path>.+)", Handler.tree),
    ("POST", f"/{REPO[:-1]}?)[.]git/info/lfs/objects/batch", Handler.lfs_batch),
    ("POST", f"/{REPO[:-1]}?)[.]git/info/lfs/verify", Handler.lfs_verify),
    ("PUT", "/lfs/(?P<oid>[0-9a-f]{64})", Handler.lfs_upload),
    ("GET HEAD", "/cdn/(?P<oid>[0-9a-f]{64})", Handler.content_network),
    ("GET HEAD", f"/{REPO}/resolve/{REV}/(?P<path>.+)", Handler.resolve),
    ("GET HEAD", "/api/telemetry/.*", Handler.nothing),
]


def metadata_problems(card: str) -> list[str]:
    """What the Hub would say against the metadata of a model card."""
    try:
        metadata = yaml.safe_load(card.split("---\n")[1])
    except (IndexError, yaml.YAMLError) as error:
        return [f"no metadata, or none that is YAML: {error}"]
    samples = metadata.get("widget", [])
    checks = {
        "tags must be a list of strings": all(isinstance(tag, str) for tag in metadata.get("tags", [])),
        "library_name must be a string": isinstance(metadata.get("library_name", ""), str),
        "pipeline_tag is unknown": metadata.get("pipeline_tag", "text-to-image") in PIPELINE_TAGS,
        "base_model must be a model of the Hub": HUB_ID.fullmatch(metadata.get("base_model", "a/b")),
        "base_model_relation is unknown": metadata.get("base_model_relation", "adapter") in RELATIONS,
        "base_model_relation needs base_model": "base_model" in metadata or "base_model_relation" not in metadata,
        "datasets must be datasets of the Hub": HUB_ID.fullmatch(metadata.get("datasets", "a/b")),
        "widget must be a list of texts and outputs": all(
            isinstance(sample["text"], str) and isinstance(sample["output"]["url"], str) for sample in samples
        ),
        "a value is null": None not in metadata.values(),
    }
    return [problem for problem, passed in checks.items() if not passed]
