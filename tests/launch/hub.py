"""A Hub on this machine: the HTTP calls that an upload makes, with a memory for repositories, large files and commits."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_local_secret_0123456789"
LARGE = (".safetensors", ".model")


@dataclass
class Hub:
    """What the server has seen; `stall_at` makes the n-th large upload hang until `release` is set."""

    endpoint: str = ""
    repositories: dict[str, bool] = field(default_factory=dict)
    large: dict[str, bytes] = field(default_factory=dict)
    put: list[str] = field(default_factory=list)
    commits: list[dict[str, Any]] = field(default_factory=list)
    unauthorized: int = 0
    stall_at: int | None = None
    stalled: threading.Event = field(default_factory=threading.Event)
    release: threading.Event = field(default_factory=threading.Event)


class Handler(BaseHTTPRequestHandler):
    """The calls; `hub` is set by the server that uses it."""

    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        """Silent."""

    def answer(self, body: Any, status: int = 200) -> None:
        data = json.dumps(body).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def body(self) -> bytes:
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            parts = []
            while size := int(self.rfile.readline().strip(), 16):
                parts.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def allowed(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return True
        self.hub.unauthorized += 1
        self.answer({"error": f"who is {self.headers.get('Authorization')}?"}, 401)
        return False

    def do_GET(self) -> None:
        name = self.path.removeprefix("/api/models/")
        if name in self.hub.repositories:
            self.answer({"id": name, "private": self.hub.repositories[name], "sha": "0" * 40})
        else:
            self.answer({"error": "not found"}, 404)

    def do_PUT(self) -> None:
        if self.hub.stall_at is not None and len(self.hub.put) >= self.hub.stall_at:
            self.hub.stalled.set()
            self.hub.release.wait(60)
        data = self.body()
        digest = hashlib.sha256(data).hexdigest()
        assert self.path.endswith(digest), "other bytes than announced"
        self.hub.large[digest] = data
        self.hub.put.append(digest)
        self.answer({})

    def do_POST(self) -> None:
        data = self.body()
        if self.path == "/api/validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif not self.allowed():
            return
        elif self.path == "/api/repos/create":
            asked = json.loads(data)
            name = f"{asked.get('organization') or 'user'}/{asked['name']}"
            known = name in self.hub.repositories
            self.hub.repositories.setdefault(name, asked.get("visibility") == "private")
            self.answer({"url": f"{self.hub.endpoint}/{name}", "error": "exists"}, 409 if known else 200)
        elif "/preupload/" in self.path:
            files = [f["path"] for f in json.loads(data)["files"]]
            modes = {path: "lfs" if path.endswith(LARGE) else "regular" for path in files}
            self.answer({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]})
        elif self.path.endswith("/info/lfs/objects/batch"):
            self.answer({"transfer": "basic", "objects": [self.large_file(o) for o in json.loads(data)["objects"]]})
        elif "/commit/" in self.path:
            self.commit([json.loads(line) for line in data.splitlines()])
        else:
            self.answer({"error": f"no such call {self.path}"}, 404)

    def large_file(self, wanted: dict[str, Any]) -> dict[str, Any]:
        known = {"oid": wanted["oid"], "size": wanted["size"]}
        href = f"{self.hub.endpoint}/large/{wanted['oid']}"
        return known if wanted["oid"] in self.hub.large else {**known, "actions": {"upload": {"href": href}}}

    def commit(self, lines: list[dict[str, Any]]) -> None:
        files: dict[str, bytes] = {}
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
        self.hub.commits.append({"path": self.path, "files": files})
        oid = f"{len(self.hub.commits):040x}"
        self.answer({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.endpoint}/user/repo/commit/{oid}"})


@contextmanager
def local_hub() -> Iterator[Hub]:
    """A running Hub on a free port of this machine."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"hub": hub}))
    server.daemon_threads = True
    hub.endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.release.set()
        server.shutdown()
        server.server_close()
        thread.join()
