"""A Hub of one model repository, on loopback: what huggingface_hub's upload and download of files need, and faults.

Follows the endpoints that huggingface_hub 2.4 calls; a commit is taken whole or not at all, as on the Hub. Leaves out:
Xet storage (HF_HUB_DISABLE_XET), branches, other repositories.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import yaml

REPO_ID = "me/my-model"
LFS_SUFFIXES = (".safetensors", ".wav", ".flac")


class StandInHub:
    """State of the server: `files` of the last commit, what was `put` and `committed`, and faults to come."""

    def __init__(self):
        self.exists, self.private, self.url = False, None, None
        self.files: dict[str, bytes] = {}
        self.num_commits = 0
        self.stored: dict[str, bytes] = {}  # large files by SHA-256, in commits or not
        self.committed: list[dict] = []  # operations of each commit
        self.faults: list[list] = []
        self.put: list[str] = []

    @property
    def head(self) -> str:
        return f"{self.num_commits:040x}"

    def fail(self, method: str, path: str, fault, times: int = 10**6):
        """Answer requests that match with an HTTP status, or drop the connection: "before" or "after" doing them."""
        self.faults.append([method, path, fault, times])

    def fault_of(self, method: str, path: str):
        for fault in self.faults:
            if fault[0] == method and re.search(fault[1], path) and fault[3] > 0:
                fault[3] -= 1
                return fault[2]
        return None

    @contextmanager
    def running(self):
        handler = type("Handler", (_Handler,), {"hub": self})
        server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()


def assert_holds(hub: StandInHub, folder: Path):
    """Assert that the repository holds the files of a folder, and no others."""
    files = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert {name: content for name, content in hub.files.items() if name != ".gitattributes"} == files


class _Handler(BaseHTTPRequestHandler):
    hub: StandInHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def _handle(self):
        fault = self.hub.fault_of(self.command, self.path)
        if fault == "before":
            self.rfile.read(1)  # in the middle of the body
            return self._drop()
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if isinstance(fault, int):
            return self._answer({"error": "refused"}, fault)
        path = self.path.split("?")[0]
        for method, pattern, action in ROUTES:
            match = re.fullmatch(pattern, path)
            if method == self.command and match:
                answer, status = action(self.hub, body, *match.groups())
                return self._drop() if fault == "after" else self._answer(answer, status)
        self._answer({"error": f"no such page: {self.command} {self.path}"}, 404)

    do_GET = do_POST = do_PUT = do_HEAD = _handle

    def _drop(self):
        self.close_connection = True
        self.connection.close()

    def _answer(self, answer, status: int):
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("X-Repo-Commit", self.hub.head)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _create(hub, body):
    wanted = json.loads(body)
    assert f"{wanted['organization']}/{wanted['name']}" == REPO_ID
    if hub.exists:
        return {"error": "You already created this model repo", "url": f"{hub.url}/{REPO_ID}"}, 409
    hub.exists, hub.private = True, wanted.get("visibility") == "private"
    hub.files = {".gitattributes": b"*.safetensors filter=lfs\n"}
    return {"url": f"{hub.url}/{REPO_ID}"}, 200


def _info(hub, body):
    if not hub.exists:
        return {"error": "Repository not found"}, 404
    return {"id": REPO_ID, "sha": hub.head, "siblings": [{"rfilename": name} for name in hub.files]}, 200


def _validate_yaml(hub, body):
    metadata = json.loads(body)["content"].split("---\n")[1]
    return ({}, 200) if isinstance(yaml.safe_load(metadata), dict) else ({"errors": [{"message": "no dict"}]}, 400)


def _oid(name, content: bytes) -> str:
    if name.endswith(LFS_SUFFIXES):
        return hashlib.sha256(content).hexdigest()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def _preupload(hub, body):
    return {
        "files": [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
                "shouldIgnore": False,
                "oid": _oid(file["path"], hub.files[file["path"]]) if file["path"] in hub.files else None,
            }
            for file in json.loads(body)["files"]
        ]
    }, 200


def _batch(hub, body):
    objects = []
    for wanted in json.loads(body)["objects"]:
        if wanted["oid"] not in hub.stored:
            wanted["actions"] = {"upload": {"href": f"{hub.url}/large/{wanted['oid']}"}}
        objects.append(wanted)
    return {"transfer": "basic", "objects": objects}, 200


def _put(hub, body, oid):
    if hashlib.sha256(body).hexdigest() != oid:
        return {"error": "not what was announced"}, 400
    hub.stored[oid] = body
    hub.put.append(oid)
    return {}, 200


def _commit(hub, body):
    header, *operations = (json.loads(line) for line in body.splitlines())
    if header["value"].get("parentCommit") not in (None, hub.head):
        return {"error": "the parent commit is not the head"}, 412
    files = dict(hub.files)
    for operation in operations:
        value = operation["value"]
        if operation["key"] == "file":
            files[value["path"]] = base64.b64decode(value["content"])
        elif operation["key"] == "lfsFile":
            if value["oid"] not in hub.stored:
                return {"error": "a large file was not uploaded"}, 400
            files[value["path"]] = hub.stored[value["oid"]]
        else:
            del files[value["path"]]
    hub.files, hub.num_commits = files, hub.num_commits + 1
    hub.committed.append({operation["value"]["path"]: operation["key"] for operation in operations})
    return {"commitUrl": f"{hub.url}/{REPO_ID}/commit/{hub.head}", "commitOid": hub.head}, 200


def _download(hub, body, name):
    return (hub.files[name], 200) if name in hub.files else ({"error": "Entry not found"}, 404)


_API = f"/api/models/{REPO_ID}"
ROUTES = [
    ("POST", "/api/repos/create", _create),
    ("GET", _API, _info),
    ("GET", f"{_API}/revision/main", _info),
    ("POST", "/api/validate-yaml", _validate_yaml),
    ("POST", f"{_API}/preupload/main", _preupload),
    ("POST", f"/{REPO_ID}.git/info/lfs/objects/batch", _batch),
    ("PUT", "/large/([0-9a-f]+)", _put),
    ("POST", f"{_API}/commit/main", _commit),
    ("GET", f"/{REPO_ID}/resolve/[0-9a-f]+/(.+)", _download),
    ("HEAD", f"/{REPO_ID}/resolve/[0-9a-f]+/(.+)", _download),
]
