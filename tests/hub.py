"""A stand-in for the Hugging Face Hub on this machine: repositories in memory, the handful of addresses that are asked.

Repositories are a single revision, `main`. Uploads are regular files; with HF_HUB_DISABLE_XET=1 nothing asks for more.
"""

import base64
import hashlib
import json
import os
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub:
    """Start it in a `with`; `files[("dataset", "org/name")]` holds a repository's files by path."""

    def __init__(self):
        self.files: dict[tuple[str, str], dict[str, bytes]] = {}
        self.asked: list[str] = []
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self):
                length = int(self.headers.get("Content-Length") or 0)
                hub.asked.append(f"{self.command} {self.path}")
                status, content, headers = hub.answer(self.command, self.path, self.rfile.read(length))
                if not isinstance(content, bytes):
                    content, headers = json.dumps(content).encode(), {"Content-Type": "application/json", **headers}
                if "Range" in self.headers and status == 200:
                    first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers["Range"]).groups()
                    end = min(int(last or len(content)), len(content) - 1)
                    headers["Content-Range"] = f"bytes {first}-{end}/{len(content)}"
                    status, content = 206, content[int(first) : end + 1]
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(content)

            do_GET = do_HEAD = do_POST = answer

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *error):
        self.server.shutdown()
        self.server.server_close()

    def environment(self, home: os.PathLike) -> dict[str, str]:
        """For a process that talks to this Hub: huggingface_hub reads the address when it is imported."""
        own = {"HF_ENDPOINT": self.address, "HF_TOKEN": "hf_test", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home)}
        return {**os.environ, **own}

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, object, dict[str, str]]:
        """Status, content and headers."""
        path, _, query = path.partition("?")
        if (method, path) == ("POST", "/api/repos/create"):
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            self.files.setdefault((asked.get("type", "model"), name), {})
            return 200, {"url": f"{self.address}/{asked.get('type', 'model')}s/{name}".replace("/models/", "/")}, {}
        if path in ("/api/validate-yaml", "/api/whoami-v2"):
            return 200, {"errors": [], "warnings": [], "name": "tester"}, {}
        if match := re.fullmatch(r"/api/(model|dataset|space)s/([^/]+/[^/]+)/preupload/main", path):
            asked = json.loads(body)["files"]
            files = [{"path": file["path"], "uploadMode": "regular", "shouldIgnore": False} for file in asked]
            return 200, {"files": files}, {}
        if match := re.fullmatch(r"/api/(model|dataset|space)s/([^/]+/[^/]+)/commit/main", path):
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    content = base64.b64decode(entry["value"]["content"])
                    self.files[match.groups()][entry["value"]["path"]] = content
            commit = self.commit(match.groups())
            url = f"{self.address}/{match[1]}s/{match[2]}/commit/{commit}".replace("/models/", "/")
            return 200, {"commitOid": commit, "commitUrl": url}, {}
        match = re.fullmatch(r"/api/(model|dataset|space)s/([^/]+/[^/]+)(?:/revision/[^/]+)?", path)
        if match and (repo := match.groups()) in self.files:
            siblings = [{"rfilename": name} for name in self.files[repo]]
            return 200, {"id": repo[1], "sha": self.commit(repo), "siblings": siblings, "tags": []}, {}
        if match := re.fullmatch(r"/api/(model|dataset|space)s/([^/]+/[^/]+)/(tree|paths-info)/[^/]+(?:/(.*))?", path):
            kind, name, what, folder = match.groups()
            if (kind, name) in self.files:
                return 200, self.listing((kind, name), folder or "", what, "recursive=true" in query.lower(), body), {}
        if match := re.fullmatch(r"/(?:(dataset|space)s/)?([^/]+/[^/]+)/resolve/([^/]+)/(.*)", path):
            kind, name, revision, file = match.groups()
            repo = (kind or "model", name)
            if file in self.files.get(repo, {}) and revision in ("main", self.commit(repo)):
                content = self.files[repo][file]
                tag = hashlib.sha1(content).hexdigest()
                return 200, content, {"ETag": f'"{tag}"', "X-Repo-Commit": self.commit(repo), "Accept-Ranges": "bytes"}
            if repo in self.files:
                return 404, {"error": "no such file"}, {"X-Error-Code": "EntryNotFound"}
        return 404, {"error": "not found"}, {"X-Error-Code": "RepoNotFound"}

    def commit(self, repo: tuple[str, str]) -> str:
        """Forty hexadecimal digits that change with the content."""
        return hashlib.sha1(repr(sorted(self.files[repo].items())).encode()).hexdigest()

    def listing(self, repo: tuple[str, str], folder: str, what: str, recursive: bool, body: bytes) -> list[dict]:
        """Files of a repository, and with them the folders unless all files below them are listed."""
        files = self.files[repo]
        if what == "paths-info":
            names = [name for name in files if name in json.loads(body)["paths"]]
        else:
            inside = f"{folder}/" if folder else ""
            names = [name for name in files if name.startswith(inside)]
            if not recursive:
                folders = {inside + name[len(inside) :].split("/")[0] for name in names} - set(files)
                tree = [{"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in sorted(folders)]
                return tree + self.entries(repo, [name for name in names if "/" not in name[len(inside) :]])
        return self.entries(repo, names)

    def entries(self, repo: tuple[str, str], names: list[str]) -> list[dict]:
        files = self.files[repo]
        return [
            {"type": "file", "path": name, "size": len(files[name]), "oid": hashlib.sha1(files[name]).hexdigest()}
            for name in names
        ]
