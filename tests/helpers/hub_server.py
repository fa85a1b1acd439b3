"""A Hugging Face hub on this machine, over real HTTP, with the standard library alone.

It has the endpoints that `huggingface_hub` and `datasets` use to read a data set, and to create one
and push to it:

    with HubServer() as hub:
        commit = hub.add("org/name", {"train.jsonl": b"..."}, private=False, gated=False)
        subprocess.run([...], env={**os.environ, **hub.env(home, token="hf_reader")})

Names, commits and files are in `hub.repos`; every request is in `hub.requests`. `hub.broken` maps a
path's end to the number of its bytes that are sent before the connection dies; `hub.uploads_left`
is the number of large files that are accepted before an upload dies. Not covered: pull requests,
Xet, the data set viewer.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

# token -> user; the owner sees private repositories, and has accepted every licence
USERS = {"hf_reader": "reader", "hf_owner": "owner"}


@dataclass
class Repo:
    name: str
    kind: str = "dataset"
    private: bool = False
    gated: bool = False
    commits: dict = field(default_factory=dict)  # commit -> {path: bytes}
    refs: dict = field(default_factory=dict)  # branch or tag -> commit
    messages: list = field(default_factory=list)

    def commit(self, files, message="", ref="main"):
        "A new commit: the files of the last one, with these added; None removes a file."
        merged = self.commits.get(self.refs.get(ref), {}) | files
        whole = {path: data for path, data in merged.items() if data is not None}
        contents = sorted((path, hashlib.sha1(data).hexdigest()) for path, data in whole.items())
        sha = hashlib.sha1(f"{self.name}{len(self.commits)}{contents}".encode()).hexdigest()
        self.commits[sha] = whole
        self.refs[ref] = sha
        self.messages.append(message)
        return sha


def oid(data):
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()  # as git names a blob


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def answer(self, status, body=b"", headers=(), cut=None):
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        defaults = {"Content-Type": "application/json", "Content-Length": str(len(data))}
        for name, value in (defaults | dict(headers)).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[:cut])
        if cut is not None:
            self.close_connection = True
            self.wfile.flush()
            self.connection.shutdown(2)

    def refuse(self, status, code, message):
        self.answer(status, {"error": message}, {"X-Error-Code": code, "X-Error-Message": message})

    def breaks(self, length):
        "Whether a large upload is broken: the first dies halfway, later ones are refused."
        hub = self.server.hub
        if self.command != "PUT" or hub.uploads_left is None:
            return False
        with hub.lock:
            hub.uploads_left -= 1
            left = hub.uploads_left
        if left >= 0:
            return False
        hub.requests.append((self.command, unquote(urlsplit(self.path).path)))
        if left == -1:
            self.rfile.read(length // 2)
            self.close_connection = True
            self.connection.shutdown(2)
        else:
            self.rfile.read(length)
            self.refuse(400, "", "not now")
        return True

    def handle_request(self):
        length = int(self.headers.get("Content-Length") or 0)
        if self.breaks(length):
            return
        self.body, url = self.rfile.read(length), urlsplit(self.path)
        self.query, path = parse_qs(url.query), url.path
        self.token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        self.server.hub.requests.append((self.command, unquote(path)))
        if self.token and self.token not in USERS:
            return self.refuse(401, "", "Invalid credentials in Authorization header")
        for method, pattern, call in ROUTES:
            if self.command in method and (m := re.fullmatch(pattern, path)):
                return call(self, **{k: unquote(v) if v else v for k, v in m.groupdict().items()})
        self.server.hub.unknown.append((self.command, self.path))
        self.refuse(404, "", "Not found")

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = handle_request

    def repo(self, name, kind="datasets"):
        "The repository, or None when it was refused; a private one does not exist for others."
        repo = self.server.hub.repos.get((kind.rstrip("s"), name))
        if repo and (not repo.private or USERS.get(self.token) == "owner"):
            return repo
        self.refuse(404 if self.token else 401, "RepoNotFound", "Repository not found")

    def files(self, repo, rev):
        "(commit, files) of a revision; None when it was refused."
        sha = repo.refs.get(rev, rev)
        if sha in repo.commits:
            return sha, repo.commits[sha]
        self.refuse(404, "RevisionNotFound", f"Invalid rev id: {rev}")

    # reading
    def info(self, kind, name, rev=None):
        if not (repo := self.repo(name, kind)) or not (found := self.files(repo, rev or "main")):
            return
        self.answer(
            200,
            dict(
                id=name,
                _id="0" * 24,
                author=name.split("/")[0],
                sha=found[0],
                private=repo.private,
                gated="auto" if repo.gated else False,
                disabled=False,
                tags=[],
                downloads=0,
                likes=0,
                lastModified="2026-01-01T00:00:00.000Z",
                createdAt="2026-01-01T00:00:00.000Z",
                siblings=[{"rfilename": p} for p in found[1]],
            ),
        )

    def refs(self, kind, name):
        if repo := self.repo(name, kind):
            self.answer(
                200,
                dict(
                    branches=[
                        dict(name=k, ref=f"refs/heads/{k}", targetCommit=v)
                        for k, v in repo.refs.items()
                    ],
                    tags=[],
                    converts=[],
                ),
            )

    def entries(self, files, folder="", recursive=False):
        below = {
            p: d for p, d in files.items() if not folder or p.startswith(folder.rstrip("/") + "/")
        }
        depth = len(folder.split("/")) if folder else 0
        folders = {
            "/".join(p.split("/")[:i]) for p in below for i in range(depth + 1, len(p.split("/")))
        }
        found = [dict(type="directory", oid="0" * 40, size=0, path=p) for p in sorted(folders)] + [
            dict(type="file", oid=oid(d), size=len(d), path=p) for p, d in sorted(below.items())
        ]
        return [e for e in found if recursive or len(e["path"].split("/")) == depth + 1]

    def tree(self, kind, name, rev, path=""):
        if not (repo := self.repo(name, kind)) or not (found := self.files(repo, rev)):
            return
        entries = self.entries(
            found[1], path or "", self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        )
        self.answer(200, entries) if entries or not path else self.refuse(
            404, "EntryNotFound", f"{path} does not exist"
        )

    def paths_info(self, kind, name, rev):
        if not (repo := self.repo(name, kind)) or not (found := self.files(repo, rev)):
            return
        asked = (
            json.loads(self.body)["paths"]
            if self.body[:1] == b"{"
            else parse_qs(self.body.decode()).get("paths", [])
        )
        self.answer(200, [e for e in self.entries(found[1], recursive=True) if e["path"] in asked])

    def resolve(self, name, rev, path, kind="models"):
        kind = kind.rstrip("/") if kind else "models"
        if not (repo := self.repo(name, kind)):
            return
        if repo.gated and USERS.get(self.token) != "owner":
            return self.refuse(
                403 if self.token else 401,
                "GatedRepo",
                f"Access to {kind.rstrip('s')} {name} is restricted. You must accept its licence.",
            )
        if not (found := self.files(repo, rev)):
            return
        sha, files = found
        if path not in files:
            return self.answer(
                404,
                {"error": "Entry not found"},
                {
                    "X-Error-Code": "EntryNotFound",
                    "X-Error-Message": "Entry not found",
                    "X-Repo-Commit": sha,
                },
            )
        data, headers = (
            files[path],
            {
                "ETag": f'"{oid(files[path])}"',
                "X-Repo-Commit": sha,
                "Accept-Ranges": "bytes",
                "Content-Type": "application/octet-stream",
            },
        )
        cut = (
            next((n for end, n in self.server.hub.broken.items() if path.endswith(end)), None)
            if self.command == "GET"
            else None
        )
        if m := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            first, last = int(m[1]), min(int(m[2] or len(data) - 1), len(data) - 1)
            if first >= len(data):
                return self.answer(416, b"", {"Content-Range": f"bytes */{len(data)}"})
            return self.answer(
                206,
                data[first : last + 1],
                headers | {"Content-Range": f"bytes {first}-{last}/{len(data)}"},
                cut,
            )
        self.answer(200, data, headers, cut)

    def auth_check(self, kind, name):
        if not (repo := self.repo(name, kind)):
            return
        if repo.gated and USERS.get(self.token) != "owner":
            return self.refuse(
                403 if self.token else 401, "GatedRepo", f"Access to {name} is restricted."
            )
        self.answer(200, {})

    def whoami(self):
        if not self.token:
            return self.refuse(401, "", "Invalid username or password.")
        self.answer(
            200,
            dict(
                type="user",
                name=USERS[self.token],
                orgs=[],
                auth=dict(type="access_token", accessToken=dict(role="write", displayName="test")),
            ),
        )

    # writing: the owner's token only
    def may_write(self):
        if USERS.get(self.token) == "owner":
            return True
        self.refuse(403 if self.token else 401, "", "You need a token with write access")

    def create(self):
        if not self.may_write():
            return
        asked = json.loads(self.body)
        name = (
            f"{asked.get('organization') or USERS[self.token]}/{asked['name']}"
            if "/" not in asked["name"]
            else asked["name"]
        )
        url = f"{self.server.hub.url}/{'datasets/' if asked.get('type') == 'dataset' else ''}{name}"
        if (asked.get("type") or "model", name) in self.server.hub.repos:
            return self.answer(409, dict(error="You already created this repo", url=url))
        self.server.hub.add(
            name,
            {".gitattributes": b""},
            kind=asked.get("type") or "model",
            private=bool(asked.get("private") or asked.get("visibility") == "private"),
        )
        self.answer(200, dict(url=url, name=name, id=name))

    def preupload(self, kind, name, rev):
        if self.may_write() and self.repo(name, kind):
            self.answer(
                200,
                dict(
                    files=[
                        dict(
                            path=f["path"],
                            uploadMode="lfs" if f["path"].endswith(LARGE) else "regular",
                            shouldIgnore=False,
                            oid=None,
                        )
                        for f in json.loads(self.body)["files"]
                    ]
                ),
            )

    def lfs_batch(self, kind, name):
        "Git LFS: where to put each large file."
        if not self.may_write():
            return

        def to(o):
            return (
                {}
                if o["oid"] in self.server.hub.large
                else dict(
                    actions=dict(
                        upload=dict(href=f"{self.server.hub.url}/lfs/{o['oid']}", header={})
                    )
                )
            )

        self.answer(
            200,
            dict(
                transfer="basic",
                objects=[
                    dict(oid=o["oid"], size=o["size"], **to(o))
                    for o in json.loads(self.body)["objects"]
                ],
            ),
            {"Content-Type": "application/vnd.git-lfs+json"},
        )

    def lfs_put(self, sha):
        if hashlib.sha256(self.body).hexdigest() != sha:
            return self.refuse(400, "", "the content does not have this hash")
        self.server.hub.large[sha] = self.body
        self.answer(200, {})

    def commit(self, kind, name, rev):
        if not self.may_write() or not (repo := self.repo(name, kind)):
            return
        lines = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        head = next(x["value"] for x in lines if x["key"] == "header")
        files = {
            x["value"]["path"]: base64.b64decode(x["value"]["content"])
            for x in lines
            if x["key"] == "file"
        } | {x["value"]["path"]: None for x in lines if x["key"] == "deletedFile"}
        files |= {
            x["value"]["path"]: self.server.hub.large[x["value"]["oid"]]
            for x in lines
            if x["key"] == "lfsFile"
        }
        sha = repo.commit(files, head.get("summary", ""), rev)
        self.answer(
            200,
            dict(
                commitUrl=f"{self.server.hub.url}/{kind}/{name}/commit/{sha}",
                commitOid=sha,
                hookOutput="",
                success=True,
            ),
        )

    def validate_yaml(self):
        self.answer(200, dict(errors=[], warnings=[]))


# what the hub keeps as Git LFS
LARGE = (".parquet", ".arrow", ".safetensors", ".bin", ".gguf", ".zip", ".gz")
API = (
    r"/api/(?P<kind>datasets|models)/(?P<name>[^/]+"
    r"(?:/(?!tree/|revision/|paths-info/|preupload/|commit/|refs|auth-check)[^/]+)?)"
)
ROUTES = [
    ("GET HEAD", API, Handler.info),
    ("GET HEAD", API + r"/revision/(?P<rev>[^/]+)", Handler.info),
    ("GET", API + "/refs", Handler.refs),
    ("GET", API + "/auth-check", Handler.auth_check),
    ("GET", API + r"/tree/(?P<rev>[^/]+)(?:/(?P<path>.*))?", Handler.tree),
    ("POST", API + r"/paths-info/(?P<rev>[^/]+)", Handler.paths_info),
    (
        "GET HEAD",
        r"/(?P<kind>datasets/)?(?P<name>[^/]+/[^/]+)/resolve/(?P<rev>[^/]+)/(?P<path>.+)",
        Handler.resolve,
    ),
    ("GET", "/api/whoami-v2", Handler.whoami),
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate_yaml),
    ("POST", API + r"/preupload/(?P<rev>[^/]+)", Handler.preupload),
    ("POST", API + r"/commit/(?P<rev>[^/]+)", Handler.commit),
    (
        "POST",
        r"/(?P<kind>datasets/)?(?P<name>[^/]+/[^/]+)\.git/info/lfs/objects/batch",
        Handler.lfs_batch,
    ),
    ("PUT", r"/lfs/(?P<sha>[0-9a-f]+)", Handler.lfs_put),
]


class HubServer:
    "The server, in a thread of its own; a context manager."

    def __init__(self):
        (
            self.repos,
            self.requests,
            self.unknown,
            self.broken,
            self.large,
            self.uploads_left,
            self.lock,
        ) = {}, [], [], {}, {}, None, threading.Lock()

    def add(
        self, name, files, kind="dataset", private=False, gated=False, ref="main", message="first"
    ):
        "Add a repository, or a commit to one; the commit's hash."
        repo = self.repos.setdefault((kind, name), Repo(name, kind, private, gated))
        return repo.commit(
            {k: v if isinstance(v, (bytes, type(None))) else v.encode() for k, v in files.items()},
            message,
            ref,
        )

    def env(self, home, token=None, **more):
        "The environment of a client that knows this hub only, with its caches in `home`."
        return dict(
            HF_ENDPOINT=self.url,
            HF_HOME=str(home),
            HF_TOKEN=token or "",
            HF_HUB_DISABLE_XET="1",
            HF_HUB_DISABLE_TELEMETRY="1",
            HF_HUB_OFFLINE="0",
            NO_PROXY="127.0.0.1",
            HF_HUB_DISABLE_IMPLICIT_TOKEN="0",
            MEDFT_CACHE=str(home / "fetched"),
            HF_HUB_DISABLE_PROGRESS_BARS="1",
            **more,
        )

    def __enter__(self):
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads, self.server.hub = True, self
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
