"""A stand-in for the Hugging Face hub on this machine: what huggingface_hub asks for to create, commit and download."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """Repositories by name, each a dict of files; and every request that came."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.requests: list[str] = []

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in {"Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def answer_json(self, values: object) -> None:
        self.answer(200, json.dumps(values).encode(), Content_Type="application/json")

    def missing(self, kind: str) -> None:
        self.answer(404, b"{}", X_Error_Code=kind, X_Error_Message="none here")

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def do_POST(self) -> None:
        path, body = urlsplit(self.path).path, self.body()
        self.server.requests.append(f"POST {path}")
        if path == "/api/repos/create":
            values = json.loads(body)
            name = f"{values['organization']}/{values['name']}"
            self.server.repos.setdefault(name, {})
            return self.answer_json({"url": f"{self.server.address}/{name}", "name": name})
        if path == "/api/validate-yaml":
            return self.answer_json({"errors": [], "warnings": []})
        repo, _, action = path.removeprefix("/api/models/").partition("/preupload/")
        if action:
            files = json.loads(body)["files"]
            return self.answer_json(
                {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]}
            )
        repo = path.removeprefix("/api/models/").partition("/commit/")[0]
        for line in map(json.loads, body.splitlines()):
            if line["key"] == "file":
                self.server.repos[repo][line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        url = f"{self.server.address}/{repo}/commit/{COMMIT}"
        return self.answer_json({"commitUrl": url, "commitOid": COMMIT, "success": True})

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        if path.startswith("/api/models/"):
            repo = path.removeprefix("/api/models/").partition("/revision/")[0]
            if repo not in self.server.repos:
                return self.missing("RepoNotFound")
            siblings = [{"rfilename": name} for name in self.server.repos[repo]]
            return self.answer_json({"id": repo, "sha": COMMIT, "siblings": siblings, "private": False})
        repo, _, rest = path.strip("/").partition("/resolve/")
        files = self.server.repos.get(repo)
        if files is None:
            return self.missing("RepoNotFound")
        content = files.get(rest.partition("/")[2])
        if content is None:
            return self.missing("EntryNotFound")
        tag = f'"{hashlib.sha1(content).hexdigest()}"'
        return self.answer(200, content, ETag=tag, X_Repo_Commit=COMMIT, Content_Type="application/octet-stream")

    do_HEAD = do_GET


@contextmanager
def stand_in_hub() -> Iterator[Hub]:
    """The hub, served until the block ends."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
