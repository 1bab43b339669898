"""A model hub on loopback for the real hub client: what it is asked for, and what it answers.

Large files are answered as the hub does: a redirect to another address, which knows ranges. It can
break a connection in the middle of a file, lie about a size, and ask for a token.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

LARGE = (".safetensors", ".bin", ".h5", ".msgpack", ".onnx")
TOKEN = "hf_right"


@dataclass
class Repository:
    commits: dict[str, Path]
    """Commit -> the folder with its files."""
    branches: dict[str, str]
    gated: bool = False


@dataclass
class Hub:
    url: str = ""
    cdn: str = ""
    """Another host, which gets no token."""
    repositories: dict[str, Repository] = field(default_factory=dict)
    log: list[str] = field(default_factory=list)
    """METHOD path, and the range that was asked for, of every request."""
    breaks: dict[str, list[int]] = field(default_factory=dict)
    """File name -> after how many bytes each of its next answers breaks off."""
    too_long: set[str] = field(default_factory=set)
    """Names of files of which the hub says that they are longer than what it sends."""

    def add(self, repo: str, folder: Path, commit: str = "a" * 40, **fields: Any) -> None:
        """A repository whose branch main is at `commit`; one that is there moves on to it."""
        known = self.repositories.setdefault(repo, Repository({}, {}, **fields))
        known.commits[commit] = folder
        known.branches["main"] = commit

    def files(self) -> list[str]:
        """Names of the files that were sent, with the ranges."""
        pattern = re.compile(r"GET /(?:cdn/[^/]+/[^/]+|[^/]+/[^/]+/resolve/[^/]+)/(.*)")
        found = (pattern.fullmatch(line) for line in self.log)
        return sorted(each[1] for each in found if each)


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """A client may go away."""


def sha(path: Path, name: str) -> str:
    return hashlib.new(name, path.read_bytes()).hexdigest()


@contextmanager
def serve() -> Iterator[Hub]:
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *_: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer()

        def do_GET(self) -> None:
            self.answer()

        def answer(self) -> None:
            path = unquote(urlsplit(self.path).path)
            asked = self.headers.get("Range", "")
            hub.log.append(f"{self.command} {path} {asked}".rstrip())
            if match := re.fullmatch(r"/cdn/([0-9a-f]{40})/([^/]+--[^/]+)/(.+)", path):
                repository = hub.repositories[match[2].replace("--", "/")]
                self.send_large(repository.commits[match[1]] / match[3])
                return
            api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/([^/]+)(.*))?", path)
            file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
            match = api or file
            if match is None or match[1] not in hub.repositories:
                self.refuse(404, "RepoNotFound", "Repository not found")
                return
            repository = hub.repositories[match[1]]
            revision = (api[3] or "main") if api else match[2]
            commit = repository.branches.get(revision, revision)
            if commit not in repository.commits:
                self.refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            elif api:
                self.send_json(match[1], repository, commit, tree=api[2] == "tree")
            else:
                self.send_file(match[1], repository, commit, match[3])

        def refuse(self, status: int, code: str, message: str) -> None:
            self.send_response(status)
            self.send_header("X-Error-Code", code)
            self.send_header("X-Error-Message", message)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def send_json(self, repo: str, repository: Repository, commit: str, *, tree: bool) -> None:
            root, entries = repository.commits[commit], []
            for path in sorted(each for each in root.rglob("*") if each.is_file()):
                name, size = path.relative_to(root).as_posix(), path.stat().st_size
                lfs = {"sha256": sha(path, "sha256"), "size": size, "pointerSize": 130}
                large = {"lfs": lfs} if path.suffix in LARGE else {}
                blob = sha(path, "sha1")
                if tree:
                    large = {"lfs": {"oid": lfs["sha256"], **lfs}} if large else {}
                    entries.append(
                        {"type": "file", "path": name, "oid": blob, "size": size, **large}
                    )
                else:
                    entries.append({"rfilename": name, "blobId": blob, "size": size, **large})
            info = {"id": repo, "modelId": repo, "sha": commit, "siblings": entries}
            info |= {"private": False, "gated": "auto" if repository.gated else False, "tags": []}
            self.send_bytes(json.dumps(entries if tree else info).encode(), {})

        def send_file(self, repo: str, repository: Repository, commit: str, name: str) -> None:
            path, headers = repository.commits[commit] / name, {"X-Repo-Commit": commit}
            if repository.gated and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                self.refuse(401, "GatedRepo", "Access to this model is restricted")
            elif not path.is_file():
                self.refuse(404, "EntryNotFound", "Entry not found")
            elif path.suffix in LARGE:
                size = path.stat().st_size + (path.name in hub.too_long)
                self.send_response(302)
                place = f"{commit}/{repo.replace('/', '--')}/{name}"
                self.send_header("Location", f"{hub.cdn}/cdn/{place}")
                self.send_header("X-Repo-Commit", commit)
                self.send_header("X-Linked-Etag", f'"{sha(path, "sha256")}"')
                self.send_header("X-Linked-Size", str(size))
                self.send_header("Content-Length", "0")
                self.end_headers()
            else:
                headers["ETag"] = f'"{sha(path, "sha1")}"'
                self.send_bytes(path.read_bytes(), headers)

        def send_bytes(self, body: bytes, headers: dict[str, str]) -> None:
            self.send_response(200)
            for key, value in {**headers, "Content-Length": str(len(body))}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(body)

        def send_large(self, path: Path) -> None:
            size = path.stat().st_size
            start = int(re.sub("[^0-9]", "", self.headers.get("Range", "")) or 0)
            self.send_response(206 if start else 200)
            self.send_header("Content-Length", str(size - start))
            if start:
                self.send_header("Content-Range", f"bytes {start}-{size - 1}/{size}")
            self.end_headers()
            end = size
            if ends := hub.breaks.get(path.name):
                end, self.close_connection = min(size, start + ends.pop(0)), True
            with path.open("rb") as file:
                file.seek(start)
                while start < end and (block := file.read(min(1 << 16, end - start))):
                    self.wfile.write(block)
                    start += len(block)

    server = Server(("127.0.0.1", 0), Handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    hub.cdn = f"http://localhost:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
