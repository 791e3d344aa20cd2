"""What the stand-in for the Hub holds: accounts, repositories with their commits, files in LFS and Xet, and its checks."""

from __future__ import annotations

import base64
import hashlib
import re
import struct
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

DATE = "2026-01-01T00:00:00.000Z"


@dataclass(frozen=True)
class Token:
    """Whose token it is and what it may do; `scoped` are the entities that a fine-grained one may write to."""

    user: str
    role: str
    orgs: tuple[tuple[str, str], ...] = ()
    scoped: tuple[str, ...] = ()

    def may_write(self, repo_id: str) -> bool:
        owner = repo_id.split("/")[0]
        if self.role == "fineGrained":
            return owner in self.scoped or repo_id in self.scoped
        return self.role == "write" and (owner == self.user or dict(self.orgs).get(owner) in ("write", "admin"))

    def may_read(self, repo_id: str) -> bool:
        owner = repo_id.split("/")[0]
        return owner == self.user or owner in dict(self.orgs)


TOKENS = {
    "hf_aliceWritesHere": Token("alice", "write", orgs=(("lab", "write"), ("museum", "read"))),
    "hf_aliceReadsHere": Token("alice", "read"),
    "hf_aliceScopedLab": Token("alice", "fineGrained", orgs=(("lab", "write"),), scoped=("lab",)),
    "hf_bobWritesHere": Token("bob", "write"),
}
FINE_GRAINED = ["repo.content.read", "repo.write"]


@dataclass(frozen=True)
class Stored:
    """A file of a commit: the bytes of a small one, or the SHA-256 under which a large one lies in LFS."""

    size: int
    data: bytes | None = None
    sha256: str | None = None

    def entry(self, path: str) -> dict[str, Any]:
        shown = self.data if self.data is not None else pointer(self.sha256 or "", self.size)
        entry: dict[str, Any] = {"type": "file", "path": path, "size": self.size, "oid": git_sha1(shown)}
        if self.sha256:
            entry["lfs"] = {"oid": self.sha256, "size": self.size, "pointerSize": len(shown)}
            if self.sha256 in XET:
                entry["xetHash"] = XET[self.sha256]
        return entry


@dataclass(frozen=True)
class Commit:
    """Files by path, as they are after it."""

    oid: str
    title: str
    message: str
    files: dict[str, Stored]
    parent: str | None


@dataclass
class Repository:
    """Commits by their id, and what branches and pull requests point to."""

    repo_id: str
    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    refs: dict[str, str] = field(default_factory=dict)
    requests: list[dict[str, Any]] = field(default_factory=list)

    def commit(self, files: dict[str, Stored], title: str, ref: str, message: str = "") -> str:
        parent = self.refs.get(ref)
        oid = hashlib.sha1(f"{self.repo_id}{title}{parent}{time.time_ns()}".encode()).hexdigest()
        self.commits[oid] = Commit(oid, title, message, files, parent)
        self.refs[ref] = oid
        return oid

    def find(self, revision: str) -> Commit:
        oid = self.refs.get(revision, revision)
        if oid not in self.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return self.commits[oid]


class Refused(Exception):
    """An answer other than success."""

    def __init__(self, status: int, message: str, code: str | None = None, **headers: str) -> None:
        self.status, self.message, self.headers = status, message, headers
        self.code = code


REPOSITORIES: dict[str, Repository] = {}
LFS: dict[str, bytes] = {}
XET: dict[str, str] = {}  # SHA-256 to Xet's own hash
SIZES: dict[str, int] = {}


def git_sha1(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def pointer(sha256: str, size: int) -> bytes:
    return f"version https://git-lfs.github.com/spec/v1\noid sha256:{sha256}\nsize {size}\n".encode()


def read_xet_store(store: Path) -> None:
    """Learn the files in the Xet store from its shards, which hold SHA-256, Xet hash and size of each."""
    for shard in store.glob("xet/xorbs/shards/*.mdb"):
        for sha256, xet_hash, size in files_of_shard(shard.read_bytes()):
            XET[sha256], SIZES[sha256] = xet_hash, size


def files_of_shard(data: bytes) -> Iterator[tuple[str, str, int]]:
    def hexadecimal(part: bytes) -> str:
        return "".join(f"{number:016x}" for number in struct.unpack("<4Q", part))

    place = 48
    while data[place : place + 32] != b"\xff" * 32:
        xet_hash = hexadecimal(data[place : place + 32])
        flags, count = struct.unpack_from("<II", data, place + 32)
        place += 48
        size = sum(struct.unpack_from("<I", data, place + 48 * number + 36)[0] for number in range(count))
        place += 48 * count * (2 if flags >> 31 else 1)
        if flags & 1 << 30:
            yield hexadecimal(data[place : place + 32]), xet_hash, size
            place += 48


def apply(key: str, value: dict[str, Any], files: dict[str, Stored], store: Path) -> None:
    """Put one operation of a commit on its files."""
    if key == "file":
        data = base64.b64decode(value["content"])
        files[value["path"]] = Stored(len(data), data=data)
    elif key == "lfsFile":
        read_xet_store(store)
        if value["oid"] not in SIZES:
            raise Refused(400, f"LFS pointer pointed to a file that does not exist: {value['path']}")
        files[value["path"]] = Stored(SIZES[value["oid"]], sha256=value["oid"])
    elif key == "deletedFile" and files.pop(value["path"], None) is None:
        raise Refused(404, "A file with this name doesn't exist", "EntryNotFound")


def tamper(path: str) -> None:
    """Change a file in the newest commit of every branch, with its size kept."""
    for repository in REPOSITORIES.values():
        for oid in set(repository.refs.values()):
            files = repository.commits[oid].files
            if path in files and files[path].data:
                data = files[path].data or b""
                files[path] = Stored(len(data), data=bytes([data[0] ^ 1]) + data[1:])


def problems_of_card(text: str) -> list[str]:
    """What the Hub's own check of a card's metadata would refuse, in so far as its documentation says."""
    match = re.match(r"---\n(.*?)\n---\n", text, re.DOTALL)
    if not match:
        return []  # the Hub only warns
    data = yaml.safe_load(match[1])
    problems = []
    for name in ("base_model", "datasets"):
        values = data.get(name) or []
        for value in [values] if isinstance(values, str) else values:
            if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", value):
                problems.append(f"{name}: {value!r} is not an id")
    if data.get("base_model_relation") not in (None, "adapter", "finetune", "merge", "quantized"):
        problems.append("base_model_relation is unknown")
    for model in data.get("model-index", []):
        for result in model["results"]:
            if not {"type", "name"} <= set(result["dataset"]) or not re.fullmatch(
                r"[\w./-]+", result["dataset"]["type"]
            ):
                problems.append("model-index: a result without a good dataset")
            if "type" not in result["task"] or any(not {"type", "value"} <= set(cell) for cell in result["metrics"]):
                problems.append("model-index: a result without task, metric or value")
    return problems
