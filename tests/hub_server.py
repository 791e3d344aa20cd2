"""A stand-in for the Hugging Face Hub on the loopback: what the real client needs to publish and load a model.

Accounts, private repositories, branches, pull requests, commits, LFS uploads, and Xet through hf_xet's own store in a
folder. Status codes and headers follow what the client's source expects. `POST /_control` sets faults, `GET` reads and
clears the log of requests. Argument: the folder of the Xet store. The first line printed is the address.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import sys
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from hub_state import (
    DATE,
    FINE_GRAINED,
    LFS,
    REPOSITORIES,
    SIZES,
    TOKENS,
    XET,
    Refused,
    Repository,
    Token,
    apply,
    git_sha1,
    problems_of_card,
    tamper,
)

LOG: list[dict[str, Any]] = []
FAULTS: list[dict[str, Any]] = []
LOCK = threading.RLock()


class Server(ThreadingHTTPServer):
    """`address` as clients write it; `store` is the folder of the Xet store."""

    def __init__(self, store: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.store, self.address = store, f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    """One request: faults first, then the route, then its answer."""

    protocol_version = "HTTP/1.1"
    server: Server
    body = b""

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing on the terminal."""

    def answer(self) -> None:
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        fault = self.take_fault(url.path)
        hangs = fault.get("kind") == "hang"
        # Whole when it is logged: the log is read, and emptied, at any moment.
        entry = {"method": self.command, "path": self.path, "status": "hangs" if hangs else 0}
        if not url.path.startswith("/_control"):
            LOG.append(entry)
        if hangs:
            time.sleep(60)
        if fault.get("kind") in ("hang", "drop"):
            return self.drop()
        self.body = self.read_body()
        try:
            if fault.get("kind") == "status":
                raise Refused(fault["status"], fault.get("message", "injected"))
            with LOCK:
                finish = self.route(url.path)()
            if fault.get("kind") == "tamper":
                tamper(fault["file"])
            if fault.get("kind") == "late":
                return self.drop()
            entry["status"] = 200
            finish()
        except Refused as refused:
            entry["status"] = refused.status
            code = {"X-Error-Code": refused.code} if refused.code else {}
            self.reply(
                {"error": refused.message},
                refused.status,
                {"X-Error-Message": refused.message, **code, **refused.headers},
            )

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def take_fault(self, path: str) -> dict[str, Any]:
        with LOCK:
            for fault in FAULTS:
                if fault["method"] == self.command and re.search(fault["path"], path):
                    if fault.get("skip", 0):
                        fault["skip"] -= 1
                    elif fault["times"]:
                        fault["times"] -= 1
                        return fault
        return {}

    def drop(self) -> None:
        self.connection.shutdown(2)
        self.close_connection = True

    def read_body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def route(self, path: str) -> Callable[[], Callable[[], None]]:
        method = "GET" if self.command == "HEAD" else self.command
        for wanted, pattern, name in ROUTES:
            match = re.fullmatch(pattern, path)
            if wanted == method and match:
                arguments = {key: unquote(value) for key, value in match.groupdict().items() if value is not None}
                return lambda: getattr(self, name)(**arguments)
        raise Refused(404, f"no route for {self.command} {path}")

    def reply(self, value: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        raw = value if isinstance(value, bytes) else json.dumps(value).encode()
        headers = {"Content-Type": "application/json", "Content-Length": str(len(raw)), **(headers or {})}
        self.send_response(status)
        for name, text in headers.items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def json(self) -> Any:
        return json.loads(self.body or b"{}")

    def token(self) -> Token | None:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if given and given not in TOKENS:
            raise Refused(401, "Invalid credentials in Authorization header")
        return TOKENS[given] if given else None

    def repository(self, repo: str, write: bool = False) -> Repository:
        token, found = self.token(), REPOSITORIES.get(repo)
        if found is None or (found.private and not (token and token.may_read(repo))):
            status, message = (404, "Repository not found") if token else (401, "Invalid username or password.")
            raise Refused(status, message, "RepoNotFound")
        if write and not (token and token.may_write(repo)):
            raise Refused(403, "Forbidden: you must use a write token to upload to a repository.")
        return found

    # Accounts and repositories

    def whoami(self) -> Callable[[], None]:
        token = self.token()
        if token is None:
            raise Refused(401, "Invalid username or password.")
        scoped = [{"entity": {"type": "org", "name": name}, "permissions": FINE_GRAINED} for name in token.scoped]
        access: dict[str, Any] = {"displayName": "laptop", "role": token.role}
        if token.role == "fineGrained":
            access["fineGrained"] = {"canReadGatedRepos": False, "global": [], "scoped": scoped}
        orgs = [{"type": "org", "name": name, "roleInOrg": role} for name, role in token.orgs]
        auth = {"type": "access_token", "accessToken": access}
        return lambda: self.reply({"type": "user", "name": token.user, "orgs": orgs, "auth": auth})

    def create(self) -> Callable[[], None]:
        token, asked = self.token(), self.json()
        repo = f"{asked.get('organization') or (token.user if token else '')}/{asked['name']}"
        if token is None or not token.may_write(repo):
            raise Refused(403, "You don't have the rights to create a model under this namespace")
        url = f"{self.server.address}/{repo}"
        if repo in REPOSITORIES:
            return lambda: self.reply({"error": "You already created this model repo", "url": url}, 409)
        new = REPOSITORIES[repo] = Repository(repo, asked.get("visibility") == "private")
        new.commit({}, "initial commit", "main")
        return lambda: self.reply({"url": url, "name": repo, "id": repo})

    def info(self, repo: str, revision: str = "main") -> Callable[[], None]:
        found = self.repository(repo)
        commit = found.find(revision)
        siblings = [{"rfilename": path} for path in sorted(commit.files)]
        known = {"id": repo, "modelId": repo, "author": repo.split("/")[0], "sha": commit.oid, "private": found.private}
        return lambda: self.reply({**known, "gated": False, "tags": [], "downloads": 0, "siblings": siblings})

    def auth_check(self, repo: str) -> Callable[[], None]:
        self.repository(repo, write=True)
        return lambda: self.reply({})

    def branch(self, repo: str, revision: str) -> Callable[[], None]:
        found = self.repository(repo, write=True)
        if revision in found.refs:
            raise Refused(409, f"Reference already exists: refs/heads/{revision}")
        found.refs[revision] = found.find(self.json().get("startingPoint", "main")).oid
        return lambda: self.reply({}, 201)

    def commits(self, repo: str, revision: str) -> Callable[[], None]:
        found = self.repository(repo)
        history, oid = [], found.find(revision).oid
        while oid:
            commit = found.commits[oid]
            history.append({"id": oid, "title": commit.title, "message": commit.message, "date": DATE, "authors": []})
            oid = commit.parent or ""
        return lambda: self.reply(history)

    def discussions(self, repo: str) -> Callable[[], None]:
        requests = self.repository(repo).requests
        author = self.query.get("author", [None])[0]
        shown = [request for request in requests if author in (None, request["author"]["name"])]
        return lambda: self.reply({"discussions": shown, "count": len(shown), "start": 0})

    # Files

    def tree(self, repo: str, revision: str) -> Callable[[], None]:
        files = self.repository(repo).find(revision).files
        return lambda: self.reply([stored.entry(path) for path, stored in sorted(files.items())])

    def paths_info(self, repo: str, revision: str) -> Callable[[], None]:
        files = self.repository(repo).find(revision).files
        asked = parse_qs(self.body.decode()).get("paths", [])
        return lambda: self.reply([files[path].entry(path) for path in asked if path in files])

    def resolve(self, repo: str, revision: str, path: str) -> Callable[[], None]:
        commit = self.repository(repo).find(revision)
        stored = commit.files.get(path)
        if stored is None:
            raise Refused(404, "Entry not found", "EntryNotFound", **{"X-Repo-Commit": commit.oid})
        tag = stored.sha256 or git_sha1(stored.data or b"")
        headers = {"X-Repo-Commit": commit.oid, "ETag": f'"{tag}"', "Accept-Ranges": "bytes"}
        if stored.sha256:
            headers |= {"X-Linked-Size": str(stored.size), "X-Linked-Etag": f'"{tag}"'}
        if stored.sha256 in XET:
            refresh = f"{self.server.address}/api/models/{repo}/xet-read-token/{commit.oid}"
            headers |= {"X-Xet-Hash": XET[str(stored.sha256)], "X-Xet-Refresh-Route": refresh}
        if self.command == "HEAD":
            headers["Content-Length"] = str(stored.size)
        data = stored.data if stored.data is not None else LFS.get(stored.sha256 or "", b"")
        return lambda: self.reply(data, 200, headers)

    # Uploads

    def validate(self) -> Callable[[], None]:
        errors = [{"message": problem} for problem in problems_of_card(self.json()["content"])]
        return lambda: self.reply({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, repo: str, revision: str) -> Callable[[], None]:
        found = self.repository(repo, write=not self.query.get("create_pr"))
        old, answers = found.find(revision).files, []
        for file in self.json()["files"]:
            large = file["size"] >= 10 * 2**20 or b"\0" in base64.b64decode(file.get("sample") or "")
            large = large or file["path"].endswith(".safetensors")
            answer = {"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False}
            if stored := old.get(file["path"]):
                answer["oid"] = stored.sha256 or git_sha1(stored.data or b"")
            answers.append(answer)
        return lambda: self.reply({"files": answers})

    def lfs_batch(self, repo: str) -> Callable[[], None]:
        self.token()
        objects = []
        for asked in self.json()["objects"]:
            entry = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in LFS:
                href = f"{self.server.address}/_lfs/{asked['oid']}"
                entry["actions"] = {"upload": {"href": href, "header": {}}}
            objects.append(entry)
        return lambda: self.reply({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid: str) -> Callable[[], None]:
        if hashlib.sha256(self.body).hexdigest() != oid:
            raise Refused(400, "sha256 mismatch")
        LFS[oid], SIZES[oid] = self.body, len(self.body)
        return lambda: self.reply(b"")

    def xet_token(self, repo: str, kind: str, revision: str) -> Callable[[], None]:
        self.repository(repo, write=kind == "write" and not self.query.get("create_pr"))
        expires, cas = int(time.time()) + 3600, f"local://{self.server.store}"
        headers = {"X-Xet-Cas-Url": cas, "X-Xet-Access-Token": "xet", "X-Xet-Token-Expiration": str(expires)}
        return lambda: self.reply({"accessToken": "xet", "exp": expires, "casUrl": cas}, 200, headers)

    def commit(self, repo: str, revision: str) -> Callable[[], None]:
        request = bool(self.query.get("create_pr"))
        found, token = self.repository(repo, write=not request), self.token()
        head, files = found.find(revision), dict(found.find(revision).files)
        lines = [json.loads(line) for line in self.body.splitlines() if line.strip()]
        header = next(line["value"] for line in lines if line["key"] == "header")
        if header.get("parentCommit", head.oid) != head.oid and not request:
            raise Refused(412, "A commit has happened since. Please refresh and try again.")
        for line in lines:
            apply(line["key"], line["value"], files, self.server.store)
        ref = revision
        if request:
            assert token
            number = len(found.requests) + 1
            ref = f"refs/pr/{number}"
            found.requests.append(
                {"num": number, "title": header["summary"], "author": {"name": token.user}, "createdAt": DATE}
                | {"status": "open", "isPullRequest": True, "repo": {"name": repo, "type": "model"}}
            )
        oid = found.commit(files, header["summary"], ref, header.get("description") or "")
        address = f"{self.server.address}/{repo}"
        answer = {"success": True, "commitOid": oid, "commitUrl": f"{address}/commit/{oid}", "hookOutput": ""}
        if request:
            answer["pullRequestUrl"] = f"{address}/discussions/{number}"
        return lambda: self.reply(answer)

    def control(self) -> Callable[[], None]:
        if self.command == "POST":
            asked = self.json()
            FAULTS[:] = asked.get("faults", [])
            if "tamper" in asked:
                tamper(asked["tamper"])
        log = list(LOG)
        LOG.clear()
        return lambda: self.reply(log)


_API = r"/api/models/(?P<repo>[^/]+/[^/]+)"
_REVISION = r"(?P<revision>refs/pr/\d+|[^/]+)"
_REPO = r"/(?P<repo>[^/]+/[^/]+)"
ROUTES = [
    ("GET", "/api/whoami-v2", "whoami"),
    ("POST", "/api/repos/create", "create"),
    ("POST", "/api/validate-yaml", "validate"),
    ("GET", _API, "info"),
    ("GET", rf"{_API}/revision/{_REVISION}", "info"),
    ("GET", rf"{_API}/auth-check/write", "auth_check"),
    ("GET", rf"{_API}/tree/{_REVISION}", "tree"),
    ("POST", rf"{_API}/paths-info/{_REVISION}", "paths_info"),
    ("GET", rf"{_API}/commits/{_REVISION}", "commits"),
    ("GET", rf"{_API}/discussions", "discussions"),
    ("POST", rf"{_API}/branch/(?P<revision>.+)", "branch"),
    ("POST", rf"{_API}/preupload/{_REVISION}", "preupload"),
    ("POST", rf"{_API}/commit/{_REVISION}", "commit"),
    ("GET", rf"{_API}/xet-(?P<kind>read|write)-token/{_REVISION}", "xet_token"),
    ("POST", rf"{_REPO}\.git/info/lfs/objects/batch", "lfs_batch"),
    ("PUT", r"/_lfs/(?P<oid>\w{64})", "lfs_put"),
    ("GET", rf"{_REPO}/resolve/{_REVISION}/(?P<path>.+)", "resolve"),
    ("GET", "/_control", "control"),
    ("POST", "/_control", "control"),
]


def main() -> None:
    """Serve on a free port until the process is ended."""
    server = Server(Path(sys.argv[1]))
    print(server.address, flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
