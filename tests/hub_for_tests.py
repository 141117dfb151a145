"""A stand-in for the Hugging Face Hub: it takes a repository over HTTP and keeps what arrives."""

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import yaml

LARGE = 1000
"""Bytes from which a file goes to the storage for large files."""


@dataclass
class Hub:
    """What the server knows."""

    address: str = ""
    token: str = "hf_good"
    user: str = "somebody"
    repositories: dict[str, bool] = field(default_factory=dict)
    """Name -> whether it is private."""
    files: dict[str, dict[str, bytes]] = field(default_factory=dict)
    """Repository -> files of the last commit."""
    storage: dict[str, bytes] = field(default_factory=dict)
    """Large files by their SHA-256."""
    messages: list[str] = field(default_factory=list)
    asked: list[str] = field(default_factory=list)
    fails_with: int | None = None
    """Status of every answer about files."""
    refuses_large_files: bool = False


class Refused(Exception):
    """An answer other than 200."""

    def __init__(self, status: int, message: str, **more: Any) -> None:
        super().__init__(message)
        self.status, self.body = status, {"error": message, **more}


@contextmanager
def hub() -> Iterator[Hub]:
    """A running server."""
    state = Hub()

    class Answers(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_POST(self) -> None:
            self.answer()

        def do_PUT(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            state.asked.append(f"{self.command} {self.path}")
            try:
                status, body = 200, respond(state, self.path, content, self.headers.get("Authorization"))
            except Refused as refused:
                status, body = refused.status, refused.body
            answer = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Answers)
    state.address = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def respond(state: Hub, path: str, content: bytes, authorization: str | None) -> Any:
    """The answer to one request."""
    if path.startswith("/storage/"):
        digest = path.removeprefix("/storage/")
        assert hashlib.sha256(content).hexdigest() == digest
        state.storage[digest] = content
        return {}
    if authorization != f"Bearer {state.token}":
        raise Refused(401, "Invalid username or password.")
    if path == "/api/repos/create":
        return created(state, json.loads(content))
    if path == "/api/validate-yaml":
        yaml.safe_load(json.loads(content)["content"].split("---\n")[1])
        return {"warnings": [], "errors": []}
    if path.endswith(".git/info/lfs/objects/batch"):
        return {"objects": [with_place(state, own) for own in json.loads(content)["objects"]]}
    repository, kind = "/".join(path.split("/")[3:5]), path.split("/")[5:6]
    if repository not in state.repositories:
        raise Refused(404, "Repository not found")
    if not kind:
        return {"id": repository, "sha": "0" * 40}
    if state.fails_with:
        raise Refused(state.fails_with, "You do not have the right to write here")
    if kind == ["preupload"]:
        files = json.loads(content)["files"]
        modes = {own["path"]: "lfs" if own["size"] >= LARGE else "regular" for own in files}
        return {"files": [{"path": name, "uploadMode": mode, "shouldIgnore": False} for name, mode in modes.items()]}
    assert kind == ["commit"], path
    return committed(state, repository, [json.loads(line) for line in content.splitlines()])


def created(state: Hub, wanted: dict[str, Any]) -> dict[str, str]:
    owner = wanted["organization"] or state.user
    name = f"{owner}/{wanted['name']}"
    address = {"url": f"{state.address}/{name}"}
    if owner != state.user:
        raise Refused(403, f"You don't have the rights to create a model under the namespace {owner}")
    if name in state.repositories:
        raise Refused(409, "You already created this model repo", **address)
    state.repositories[name] = wanted.get("visibility") == "private" or wanted.get("private") is True
    return address


def with_place(state: Hub, wanted: dict[str, Any]) -> dict[str, Any]:
    """Where a large file goes; nowhere if it is there already."""
    if state.refuses_large_files:
        return {**wanted, "error": {"code": 422, "message": "no room"}}
    if wanted["oid"] in state.storage:
        return wanted
    return {**wanted, "actions": {"upload": {"href": f"{state.address}/storage/{wanted['oid']}"}}}


def committed(state: Hub, repository: str, lines: list[dict[str, Any]]) -> dict[str, str]:
    files = state.files.setdefault(repository, {})
    for line in lines:
        own = line["value"]
        if line["key"] == "header":
            state.messages.append(own["summary"])
        elif line["key"] == "file":
            files[own["path"]] = base64.b64decode(own["content"])
        else:
            assert line["key"] == "lfsFile", line
            files[own["path"]] = state.storage[own["oid"]]
    return {"commitUrl": f"{state.address}/{repository}/commit/1", "commitOid": "1" * 40}
