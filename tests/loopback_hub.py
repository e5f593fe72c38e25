"""A Hub on the loopback address, with the endpoints that loading a repository asks for.

It serves folders as repositories with any number of commits, so that what `from_pretrained` and `snapshot_download`
really do is tried without a network.
"""

import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse


class HubHandler(BaseHTTPRequestHandler):
    """Answers for `hub`, which a subclass names."""

    hub: "LoopbackHub"
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = unquote(urlparse(self.path).path).strip("/").split("/")
        if path[:2] == ["api", "models"]:
            return self.answer_api("/".join(path[2:4]), path[4:])
        if path[2:3] == ["resolve"]:
            return self.answer_file("/".join(path[:2]), path[3], "/".join(path[4:]))
        return self.answer(404, b"")

    do_HEAD = do_GET

    def answer_api(self, repo: str, rest: list[str]):
        found = self.hub.resolve(repo, rest[1] if len(rest) > 1 else "main")
        if found is None:
            return self.answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        commit, folder = found
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        names = [str(file.relative_to(folder)) for file in files]
        if rest[:1] == ["tree"]:
            entries = [
                {"type": "file", "path": name, "size": file.stat().st_size, "oid": etag(file)}
                for name, file in zip(names, files, strict=True)
            ]
            return self.answer_json(entries)
        siblings = [{"rfilename": name} for name in names]
        return self.answer_json({"id": repo, "modelId": repo, "sha": commit, "siblings": siblings, "tags": []})

    def answer_file(self, repo: str, revision: str, name: str):
        found = self.hub.resolve(repo, revision)
        if found is None:
            return self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        commit, folder = found
        file = folder / name
        if not file.is_file():
            return self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
        return self.answer(200, file.read_bytes(), {"X-Repo-Commit": commit, "ETag": f'"{etag(file)}"'})

    def answer_json(self, value):
        return self.answer(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def answer(self, status: int, body: bytes, headers: dict[str, str] | None = None):
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *arguments):
        pass


class LoopbackHub:
    """
    Repositories by name, each a list of commits; the last commit is `main`.

    Args:
        repos (`dict[str, list[Path]]`): For every repository the folder of each commit, oldest first.
    """

    def __init__(self, repos: dict[str, list[Path]]):
        self.repos = repos

    def commits(self, repo: str) -> dict[str, Path]:
        """Folders by commit hash."""
        return {hashlib.sha1(f"{repo}/{index}".encode()).hexdigest(): f for index, f in enumerate(self.repos[repo])}

    def resolve(self, repo: str, revision: str) -> tuple[str, Path] | None:
        """Commit and folder of a branch, a commit, or nothing."""
        commits = self.commits(repo) if repo in self.repos else {}
        if revision == "main" and commits:
            revision = list(commits)[-1]
        return (revision, commits[revision]) if revision in commits else None

    @contextmanager
    def serve(self):
        """The address of the running server."""
        server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (HubHandler,), {"hub": self}))
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            server.server_close()


def etag(file: Path) -> str:
    return hashlib.sha1(file.read_bytes()).hexdigest()
