"""A Hub on the loopback address, with the endpoints that loading and pushing a repository ask for.

It serves folders as repositories with any number of commits, and takes new commits, so that what `from_pretrained`,
`snapshot_download` and `create_commit` really do is tried without a network.
"""

import base64
import hashlib
import json
import shutil
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
        path = self.path_parts()
        if path == ["api", "whoami-v2"]:
            return self.answer_user()
        if path[:2] == ["api", "models"]:
            return self.answer_api("/".join(path[2:4]), path[4:])
        if path[2:3] == ["resolve"]:
            return self.answer_file("/".join(path[:2]), path[3], "/".join(path[4:]))
        return self.answer(404, b"")

    do_HEAD = do_GET

    def do_POST(self):
        path, body = self.path_parts(), self.read_body()
        if path == ["api", "validate-yaml"]:
            return self.answer_json({"errors": [], "warnings": []})
        if not self.is_authorized():
            return self.answer(401, b"{}")
        if path == ["api", "repos", "create"]:
            return self.create_repo(json.loads(body))
        if path[-4:] == ["info", "lfs", "objects", "batch"]:
            return self.answer_upload_places(json.loads(body))
        if path[:1] == ["lfs"]:
            return self.answer_json({} if (self.hub.storage / path[1]).is_file() else None)
        if path[:2] == ["api", "models"] and path[4] == "preupload":
            modes = [{**upload_mode(file["path"]), "path": file["path"]} for file in json.loads(body)["files"]]
            return self.answer_json({"files": modes})
        if path[:2] == ["api", "models"] and path[4] == "commit":
            return self.take_commit("/".join(path[2:4]), [json.loads(line) for line in body.splitlines()])
        return self.answer(404, b"{}")

    def do_PUT(self):
        (self.hub.storage / self.path_parts()[1]).write_bytes(self.read_body())
        return self.answer(200, b"")

    def path_parts(self) -> list[str]:
        return unquote(urlparse(self.path).path).strip("/").split("/")

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        chunks = []
        while size := int(self.rfile.readline(), 16):
            chunks.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(chunks)

    def is_authorized(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {self.hub.token}"

    def answer_user(self):
        if not self.is_authorized():
            return self.answer(401, b'{"error": "Invalid credentials"}')
        return self.answer_json({"type": "user", "name": self.hub.user, "orgs": []})

    def create_repo(self, request: dict):
        owner = request.get("organization") or self.hub.user
        if owner != self.hub.user:
            return self.answer(403, b'{"error": "No right to write there"}')
        repo = f"{owner}/{request['name']}"
        url = {"url": f"{self.address()}/{repo}"}
        if repo in self.hub.repos:
            return self.answer_json(url, status=409)
        self.hub.repos[repo] = []
        self.hub.add_commit(repo)
        self.hub.visibilities[repo] = request.get("visibility")
        return self.answer_json(url)

    def answer_upload_places(self, request: dict):
        objects = []
        for item in request["objects"]:
            place = {"href": f"{self.address()}/lfs/{item['oid']}"}
            objects.append({**item, "actions": {"upload": place, "verify": place}})
        return self.answer_json({"transfer": "basic", "objects": objects})

    def take_commit(self, repo: str, lines: list[dict]):
        if self.hub.refuses_commits:
            return self.answer(507, b'{"error": "No space left"}')
        folder = self.hub.add_commit(repo)
        for line in lines:
            value = line["value"]
            if line["key"] == "header":
                continue
            path = folder / value["path"]
            path.parent.mkdir(parents=True, exist_ok=True)
            if line["key"] == "file":
                path.write_bytes(base64.b64decode(value["content"]))
            elif line["key"] == "lfsFile":
                shutil.copyfile(self.hub.storage / value["oid"], path)
            else:
                raise NotImplementedError(line["key"])
        commit = list(self.hub.commits(repo))[-1]
        return self.answer_json({"commitUrl": f"{self.address()}/{repo}/commit/{commit}", "commitOid": commit})

    def address(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

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

    def answer_json(self, value, status: int = 200):
        return self.answer(status, json.dumps(value).encode(), {"Content-Type": "application/json"})

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
        storage (`Path`, *optional*): Where what is pushed goes; without one, nothing can be pushed.
    """

    user = "user"
    token = "hf_loopback"

    def __init__(self, repos: dict[str, list[Path]], storage: Path | None = None):
        self.repos = repos
        self.storage = storage
        self.visibilities: dict[str, str | None] = {}
        self.refuses_commits = False

    def add_commit(self, repo: str) -> Path:
        """The folder of a new commit, with the files of the last one."""
        folders = self.repos[repo]
        folder = self.storage / repo / str(len(folders))
        folder.parent.mkdir(parents=True, exist_ok=True)
        if folders:
            shutil.copytree(folders[-1], folder)
        else:
            folder.mkdir()
        folders.append(folder)
        return folder

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


def upload_mode(path: str) -> dict:
    """Weights and pictures go to the large file storage."""
    is_large = path.endswith((".safetensors", ".png"))
    return {"uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False, "oid": None}
