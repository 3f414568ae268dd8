"""A stand-in for the Hugging Face Hub on this machine: repositories in memory, the addresses that its client asks.

It has what the tests need: commits that stay and can be pinned, branches, private repositories, large files by Git LFS,
checked model cards, and requests that fail on demand. With HF_HUB_DISABLE_XET=1 the client asks for no more.
"""

import base64
import hashlib
import json
import os
import re
import threading
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

import yaml

Repo = tuple[str, str]  # "model", "dataset" or "space", and "owner/name"
Answer = tuple[int, object, dict[str, str]]  # status, content and headers

LARGE = 1000  # bytes from which safetensors go by LFS
NOT_FOUND = 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"}
KIND = "(model|dataset|space)s"
NAME = "([^/]+/[^/]+?)"


@dataclass
class Failure:
    """Requests that fail: those whose `METHOD /path` the pattern is found in, so many times.

    `how` is a status to answer with; "drop" hangs up half-way through the request, "lose" once it was carried out.
    """

    pattern: str
    how: int | str = 500
    times: int = 1


class Hub:
    """Start it in a `with`. What is asked stands in `asked`; what is to fail goes into `failures`.

    `files["dataset", "org/name"]` holds a repository's files by path, as of its branch `main`; `branches["dataset",
    "org/name", "v1"]` those of another branch. Both may be changed by hand, and make a new commit then. `log` has the
    commits that came by HTTP: repository, branch, title.
    """

    def __init__(self):
        self.files: dict[Repo, dict[str, bytes]] = {}
        self.branches: dict[tuple[str, str, str], dict[str, bytes]] = {}
        self.private: set[Repo] = set()
        self.tokens = {"hf_test": "tester"}
        self.failures: list[Failure] = []
        self.asked: list[str] = []
        self.log: list[tuple[Repo, str, str]] = []
        self.large: dict[str, bytes] = {}  # by repository and SHA-256: "org/name/1234..."
        self.seen: dict[tuple[Repo, str], dict[str, bytes]] = {}  # files of a commit
        self.lock = threading.Lock()
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def answer(self):
                hub.serve(self)

            do_GET = do_HEAD = do_POST = do_PUT = answer

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

    def environment(self, home: os.PathLike, token: str | None = "hf_test") -> dict[str, str]:
        """For a process that talks to this Hub: huggingface_hub reads the address when it is imported."""
        own = {"HF_ENDPOINT": self.address, "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(home)}
        others = {name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "HF_HUB_OFFLINE")}
        return {**others, **own, **({"HF_TOKEN": token} if token else {})}

    def commit(self, repo: Repo, branch: str = "main") -> str:
        """Forty hexadecimal digits that change with the content."""
        files = self.files[repo] if branch == "main" else self.branches[*repo, branch]
        sha = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.seen.setdefault((repo, sha), dict(files))
        return sha

    # --- HTTP ---------------------------------------------------------------------------------------------------------

    def serve(self, request: BaseHTTPRequestHandler) -> None:
        """Answer a request, or fail as it was asked to."""
        line = f"{request.command} {request.path}"
        length = int(request.headers.get("Content-Length") or 0)
        with self.lock:
            self.asked.append(line)
            failure = next((each for each in self.failures if each.times and re.search(each.pattern, line)), None)
            if failure is not None:
                failure.times -= 1
        if failure is not None and failure.how == "drop":
            request.rfile.read(length // 2)
            request.close_connection = True
            return
        body = request.rfile.read(length)
        if failure is not None and failure.how != "lose":
            status, content, headers = failure.how, {"error": "Internal error"}, {}
        else:
            user = self.tokens.get(request.headers.get("Authorization", "").removeprefix("Bearer "))
            with self.lock:
                status, content, headers = self.answer(request.command, request.path, body, user)
        if failure is not None and failure.how == "lose":
            request.close_connection = True
            return
        if not isinstance(content, bytes):
            content, headers = json.dumps(content).encode(), {"Content-Type": "application/json", **headers}
        if "Range" in request.headers and status == 200:
            first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", request.headers["Range"]).groups()
            end = min(int(last or len(content)), len(content) - 1)
            headers = {**headers, "Content-Range": f"bytes {first}-{end}/{len(content)}"}
            status, content = 206, content[int(first) : end + 1]
        request.send_response(status)
        for name, value in headers.items():
            request.send_header(name, value)
        request.send_header("Content-Length", str(len(content)))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(content)

    def answer(self, method: str, path: str, body: bytes, user: str | None) -> Answer:
        path, _, query = path.partition("?")
        if path == "/api/validate-yaml":
            return check_card(json.loads(body)["content"])
        if method == "PUT" and path.startswith("/large/"):  # a signed address: it needs no token
            if not path.endswith(f"/{hashlib.sha256(body).hexdigest()}"):
                return 400, {"error": "not the file that was announced"}, {}
            self.large[path.removeprefix("/large/")] = body
            return 200, {}, {}
        if (method == "POST" and user is None) or path == "/api/whoami-v2":
            return (200, {"name": user}, {}) if user else (401, {"error": "Invalid username or password."}, {})
        if path == "/api/repos/create":
            return self.create(json.loads(body), user)
        for pattern, handle in (
            (rf"/api/{KIND}/{NAME}/preupload/([^/]+)", self.preupload),
            (rf"/api/{KIND}/{NAME}/commit/([^/]+)", self.take_commit),
            (rf"/api/{KIND}/{NAME}/branch/([^/]+)", self.branch),
            (rf"/(?:(dataset|space)s/)?{NAME}\.git/info/lfs/objects/(batch|verify)", self.batch),
            (rf"/api/{KIND}/{NAME}(?:/revision/([^/]+))?", self.info),
            (rf"/api/{KIND}/{NAME}/(?:tree|paths-info)/([^/]+)(?:/.*)?", self.tree),
            (rf"/(?:(dataset|space)s/)?{NAME}/resolve/([^/]+)/.*", self.resolve),
        ):
            if match := re.fullmatch(pattern, path):
                kind, name, revision = match.groups()
                repo = (kind or "model", name)
                if repo not in self.files:
                    return NOT_FOUND
                if repo in self.private and user != name.split("/")[0]:
                    return NOT_FOUND if user else (401, *NOT_FOUND[1:])  # nobody is told that it is there
                return handle(repo, unquote(revision or "main"), unquote(path), query, body)
        return NOT_FOUND

    # --- Reading ------------------------------------------------------------------------------------------------------

    def at(self, repo: Repo, revision: str) -> dict[str, bytes] | None:
        """The files at a branch or commit."""
        self.commit(repo)
        if revision == "main":
            return self.files[repo]
        return self.branches.get((*repo, revision), self.seen.get((repo, revision)))

    def info(self, repo: Repo, revision: str, *_) -> Answer:
        if (files := self.at(repo, revision)) is None:
            return 404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"}
        card = front_matter(files.get("README.md", b"").decode(errors="replace")) or {}
        own = {key: card[key] for key in ("pipeline_tag", "library_name") if key in card}
        siblings = [{"rfilename": name} for name in files]
        own |= {"id": repo[1], "sha": self.sha(repo, revision), "private": repo in self.private}
        return 200, {**own, "siblings": siblings, "tags": []}, {}

    def sha(self, repo: Repo, revision: str) -> str:
        return revision if (repo, revision) in self.seen else self.commit(repo, revision)

    def tree(self, repo: Repo, revision: str, path: str, query: str, body: bytes) -> Answer:
        """Files, and with them the folders unless all files below them are listed."""
        if (files := self.at(repo, revision)) is None:
            return 404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"}
        _, _, rest = path.partition(f"{repo[1]}/")
        what, _, *folder = rest.split("/")
        if what == "paths-info":
            return 200, [entry(name, files[name]) for name in files if name in json.loads(body)["paths"]], {}
        inside = "".join(f"{part}/" for part in folder)
        names = [name for name in files if name.startswith(inside)]
        if "recursive=true" in query.lower():
            return 200, [entry(name, files[name]) for name in names], {}
        folders = {inside + name[len(inside) :].split("/")[0] for name in names} - set(files)
        listing = [{"type": "directory", "path": name, "oid": "0" * 40, "size": 0} for name in sorted(folders)]
        return 200, listing + [entry(name, files[name]) for name in names if "/" not in name[len(inside) :]], {}

    def resolve(self, repo: Repo, revision: str, path: str, *_) -> Answer:
        if (files := self.at(repo, revision)) is None:
            return 404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"}
        name = path.split("/resolve/", 1)[1].split("/", 1)[1]
        headers = {"X-Repo-Commit": self.sha(repo, revision)}
        if name not in files:
            return 404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound", **headers}
        return 200, files[name], {"ETag": f'"{oid_of(name, files[name])}"', "Accept-Ranges": "bytes", **headers}

    # --- Writing ------------------------------------------------------------------------------------------------------

    def create(self, asked: dict, user: str) -> Answer:
        repo = asked.get("type", "model"), f"{asked.get('organization') or user}/{asked['name']}"
        url = {"url": f"{self.address}/{repo[0]}s/{repo[1]}".replace("/models/", "/")}
        if repo in self.files:
            return 409, {"error": "You already created this repository", **url}, {}
        self.files[repo] = {}
        if asked.get("visibility") == "private":
            self.private.add(repo)
        return 200, url, {}

    def branch(self, repo: Repo, name: str, *_) -> Answer:
        if (*repo, name) in self.branches:
            return 409, {"error": "Reference already exists"}, {}
        self.branches[*repo, name] = dict(self.files[repo])
        return 200, {}, {}

    def preupload(self, repo: Repo, revision: str, _path: str, _query: str, body: bytes) -> Answer:
        if (there := self.at(repo, revision)) is None:
            return 404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"}
        files = []
        for file in json.loads(body)["files"]:
            path, mode = file["path"], "lfs" if is_large(file["path"], file["size"]) else "regular"
            oid = oid_of(path, there[path]) if path in there else None
            files.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return 200, {"files": files}, {}

    def batch(self, repo: Repo, step: str, _path: str, _query: str, body: bytes) -> Answer:
        asked = json.loads(body)
        if step == "verify":
            there = len(self.large.get(f"{repo[1]}/{asked['oid']}", b"")) == asked["size"]
            return (200, {}, {}) if there else (404, {"error": "not uploaded"}, {})
        prefix = "" if repo[0] == "model" else f"{repo[0]}s/"
        verify = {"href": f"{self.address}/{prefix}{repo[1]}.git/info/lfs/objects/verify"}
        objects = [dict(file) for file in asked["objects"]]
        for file in objects:
            if (place := f"{repo[1]}/{file['oid']}") not in self.large:
                file["actions"] = {"upload": {"href": f"{self.address}/large/{place}"}, "verify": verify}
        return 200, {"transfer": "basic", "objects": objects}, {}

    def take_commit(self, repo: Repo, branch: str, _path: str, _query: str, body: bytes) -> Answer:
        """All of it or nothing."""
        if branch != "main" and (*repo, branch) not in self.branches:
            return 404, {"error": "Invalid rev id"}, {"X-Error-Code": "RevisionNotFound"}
        files, title = dict(self.at(repo, branch)), ""
        for line in body.decode().splitlines():
            key, value = (item := json.loads(line))["key"], item["value"]
            if key == "header":
                title = value["summary"]
                if value.get("parentCommit") not in (None, self.commit(repo, branch)):
                    return 412, {"error": "A commit has happened since."}, {}
            elif key == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif key == "lfsFile":
                if (place := f"{repo[1]}/{value['oid']}") not in self.large:
                    return 400, {"error": f"The content of {value['path']} was not uploaded."}, {}
                files[value["path"]] = self.large[place]
            elif key == "deletedFile" and files.pop(value["path"], None) is None:
                return 404, {"error": "A file with this name doesn't exist"}, {"X-Error-Code": "EntryNotFound"}
        if branch == "main":
            self.files[repo] = files
        else:
            self.branches[*repo, branch] = files
        self.log.append((repo, branch, title))
        sha = self.commit(repo, branch)
        url = f"{self.address}/{repo[0]}s/{repo[1]}/commit/{sha}".replace("/models/", "/")
        return 200, {"commitOid": sha, "commitUrl": url}, {}


def is_large(path: str, size: int) -> bool:
    return path.endswith(".safetensors") and size >= LARGE


def oid_of(path: str, content: bytes) -> str:
    """What Git, or Git LFS, calls a file by."""
    if is_large(path, len(content)):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def entry(path: str, content: bytes) -> dict:
    own = {"type": "file", "path": path, "size": len(content), "oid": oid_of(path, content)}
    if is_large(path, len(content)):
        own["lfs"] = {"oid": own["oid"], "size": len(content), "pointerSize": 130}
    return own


# --- Model cards ------------------------------------------------------------------------------------------------------


def front_matter(card: str) -> dict | None:
    match = re.match(r"---\n(.*?)\n---\n", card, re.DOTALL)
    return yaml.safe_load(match[1]) if match else None


def check_card(card: str) -> Answer:
    """Accept or refuse the metadata of a card, with the Hub's rules for the fields that we write."""
    try:
        data = front_matter(card)
    except yaml.YAMLError as error:
        return 400, {"errors": [{"message": f"not valid YAML: {error}"}], "warnings": []}, {}
    if data is None:
        return 200, {"errors": [], "warnings": [{"message": "empty or missing yaml metadata in repo card"}]}, {}
    hub_id = r"[\w.-]+(/[\w.-]+)?"
    rules = {
        "license": r"[a-z0-9.-]+",
        "library_name": r"[a-z0-9_.-]+",
        "pipeline_tag": r"[a-z-]+",
        "base_model": hub_id,
        "base_model_relation": "finetune|adapter|merge|quantized",
        "datasets": hub_id,
        "tags": r"[^\n]{1,100}",
        "metrics": r"[\w.-]+",
        "language": r"[a-z]{2,3}",
    }
    values = {key: data[key] if isinstance(data[key], list) else [data[key]] for key in rules if key in data}
    errors = [
        f'"{key}" must not be {value!r}'
        for key, own in values.items()
        for value in own
        if not isinstance(value, str) or not re.fullmatch(rules[key], value)
    ]
    for model in data.get("model-index", []):
        if not isinstance(model.get("name"), str):
            errors.append('"model-index[0].name" is required')
        for result in model.get("results", []):
            needed = [result.get("task", {}).get("type"), *map(result.get("dataset", {}).get, ("type", "name"))]
            for metric in result.get("metrics", [{}]):
                needed += [metric.get("type"), "value" if metric.get("value") is not None else None]
            if not all(isinstance(value, str) and value for value in needed):
                errors.append(f'"model-index": a result lacks its task, data set or metric: {result}')
    return 400 if errors else 200, {"errors": [{"message": each} for each in errors], "warnings": []}, {}
