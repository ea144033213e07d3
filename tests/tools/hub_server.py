"""A small Hugging Face Hub on loopback, for tests: repositories in memory, the requests that huggingface_hub sends.

Speaks whoami, create_repo, upload_folder (preupload, LFS batch, commit) and file downloads. With `xet` set to a folder
the client's hf_xet keeps large files there, as it would in Xet's storage, and the Hub knows their names only.
"""

import base64
import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "0" * 40


def xet_names(folder: Path) -> dict[str, str]:
    """Xet's name of each stored file by its SHA-256, from the shards that a client wrote.

    After a header of 48 bytes a shard lists files in entries of 48: the name (four little-endian words), flags and a
    count, then that many segments, as many proofs if bit 31 is set, and the SHA-256 if bit 30 is; 32 bytes FF end it.
    """

    def hexadecimal(words: bytes) -> str:
        return "".join(f"{word:016x}" for word in struct.unpack("<4Q", words))

    names = {}
    for shard in folder.glob("xet/shard-cache/*.mdb"):
        data, at = shard.read_bytes(), 48
        while data[at : at + 32] != b"\xff" * 32:
            name, (flags, segments) = hexadecimal(data[at : at + 32]), struct.unpack_from("<2I", data, at + 32)
            at += 48 * (1 + segments * (1 + (flags >> 31)))
            if flags >> 30 & 1:
                names[hexadecimal(data[at : at + 32])] = name
                at += 48
    return names


class Hub(BaseHTTPRequestHandler):
    """One request. `server` holds repos: {repo_id: {path: bytes}}, blobs: {sha256: bytes}, tokens: {token: role}.

    `gated` are repositories that only a write token may read; `faults` maps a part of a path to what happens to the
    next requests for it: status codes to answer, or 0 to cut the connection.
    """

    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Quiet."""

    def reply(self, code: int, body: object = None, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for name, value in ({"Content-Length": str(len(data))} | (headers or {})).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def handle_request(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        path = self.path.partition("?")[0]
        role = self.server.tokens.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))
        for part, codes in self.server.faults.items():
            if part in path and codes:
                if code := codes.pop(0):
                    return self.reply(code, {"error": "not now"}, {"Retry-After": "0"})
                self.close_connection = True
                return self.connection.shutdown(socket.SHUT_RDWR)
        for pattern, action, needs_write in self.ROUTES:
            if match := re.fullmatch(pattern, path):
                if needs_write and role != "write":
                    return self.reply(403 if role else 401, {"error": "You need a token that may write."})
                return action(self, role, **match.groupdict())
        return self.reply(404, {"error": "Not found"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def whoami(self, role: str | None) -> None:
        if role is None:
            return self.reply(401, {"error": "Invalid username or password."})
        token = {"displayName": "test", "role": role}
        return self.reply(200, {"type": "user", "name": "me", "orgs": [], "auth": {"accessToken": token}})

    def create(self, role: str) -> None:
        name = f"me/{json.loads(self.body)['name']}"
        known = name in self.server.repos
        self.server.repos.setdefault(name, {})
        self.server.private |= {name} if json.loads(self.body).get("visibility") == "private" else set()
        url = f"{self.server.url}/{name}"
        self.reply(409 if known else 200, {"url": url, "name": name, "error": "You already created this model repo"})

    def info(self, role: str | None, repo: str) -> None:
        if repo not in self.server.repos:
            return self.reply(404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        files = [{"rfilename": path} for path in self.server.repos[repo]]
        return self.reply(200, {"id": repo, "modelId": repo, "sha": COMMIT, "siblings": files, "private": False})

    def tree(self, role: str | None, repo: str) -> None:
        files = self.server.repos.get(repo, {})
        self.reply(200, [{"type": "file", "path": path, "size": len(files[path]), "oid": "0"} for path in files])

    def refuse(self, role: str | None, repo: str) -> bool:
        """Whether the repository is gated for this token; if so, the answer is sent."""
        if repo not in self.server.gated or role == "write":
            return False
        message = f"Access to model {repo} is restricted."
        self.reply(403 if role else 401, {"error": message}, {"X-Error-Code": "GatedRepo", "X-Error-Message": message})
        return True

    def auth_check(self, role: str | None, repo: str) -> None:
        if not self.refuse(role, repo):
            self.info(role, repo)

    def validate(self, role: str | None) -> None:
        self.reply(200, {"errors": [], "warnings": []})

    def preupload(self, role: str, repo: str) -> None:
        files = [file["path"] for file in json.loads(self.body)["files"]]
        modes = [{"path": path, "uploadMode": "regular" if path.endswith(".md") else "lfs"} for path in files]
        self.reply(200, {"files": [mode | {"shouldIgnore": False} for mode in modes], "commitOid": COMMIT})

    def lfs_batch(self, role: str, repo: str) -> None:
        objects = json.loads(self.body)["objects"]
        upload = [{"actions": {"upload": {"href": f"{self.server.url}/lfs/{one['oid']}"}}} for one in objects]
        batch = [one | actions for one, actions in zip(objects, upload, strict=True)]
        self.reply(200, {"transfer": "basic", "objects": batch})

    def lfs_put(self, role: str | None, oid: str) -> None:
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.server.blobs[oid] = self.body
        self.reply(200, {})

    def commit(self, role: str, repo: str) -> None:
        for line in self.body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                self.server.repos[repo][value["path"]] = base64.b64decode(value["content"])
            elif item["key"] == "lfsFile":
                in_xet = self.server.xet and xet_names(self.server.xet).get(value["oid"])
                content = (in_xet, value["oid"], value["size"]) if in_xet else self.server.blobs[value["oid"]]
                self.server.repos[repo][value["path"]] = content
        url = f"{self.server.url}/{repo}/commit/{COMMIT}"
        self.reply(200, {"success": True, "commitOid": COMMIT, "commitUrl": url, "hookOutput": ""})

    def resolve(self, role: str | None, repo: str, path: str) -> None:
        if self.refuse(role, repo):
            return None
        data = self.server.repos.get(repo, {}).get(path)
        if data is None:
            return self.reply(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        if isinstance(data, tuple):  # the client fetches the bytes from Xet by itself
            name, sha256, size = data
            link = f'<{self.server.url}/api/models/{repo}/xet-read-token/{COMMIT}>; rel="xet-auth"'
            etag = {"ETag": f'"{sha256}"', "X-Linked-ETag": f'"{sha256}"', "X-Linked-Size": str(size)}
            return self.reply(200, b"", etag | {"X-Repo-Commit": COMMIT, "X-Xet-Hash": name, "Link": link})
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        return self.reply(200, data, {"X-Repo-Commit": COMMIT, "ETag": etag})

    def xet_token(self, role: str, repo: str) -> None:
        url, end = f"local://{self.server.xet}", int(time.time()) + 3600
        headers = {"X-Xet-Cas-Url": url, "X-Xet-Access-Token": "x", "X-Xet-Token-Expiration": str(end)}
        self.reply(200, {"casUrl": url, "accessToken": "x", "exp": end}, headers)

    REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
    ROUTES = [
        (r"/api/whoami-v2", whoami, False),
        (r"/api/repos/create", create, True),
        (r"/api/validate-yaml", validate, False),
        (rf"/api/models/{REPO}(?:/revision/[^/]+)?", info, False),
        (rf"/api/models/{REPO}/tree/[^/]+", tree, False),
        (rf"/api/models/{REPO}/auth-check", auth_check, False),
        (rf"/api/models/{REPO}/preupload/[^/]+", preupload, True),
        (rf"/{REPO}\.git/info/lfs/objects/batch", lfs_batch, True),
        (r"/lfs/(?P<oid>[0-9a-f]{64})", lfs_put, False),
        (rf"/api/models/{REPO}/commit/[^/]+", commit, True),
        (rf"/api/models/{REPO}/xet-write-token/[^/]+", xet_token, True),
        (rf"/api/models/{REPO}/xet-read-token/[^/]+", xet_token, False),
        (rf"/{REPO}/resolve/[^/]+/(?P<path>.+)", resolve, False),
    ]


@contextmanager
def serve() -> Iterator[ThreadingHTTPServer]:
    """A running Hub of user `me`; its `url` goes into HF_ENDPOINT."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.url = f"http://127.0.0.1:{server.server_address[1]}"
    server.repos, server.blobs, server.tokens = {}, {}, {"hf_write": "write", "hf_read": "read"}
    server.gated, server.private, server.faults, server.xet = set(), set(), {}, None
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
