"""A stand-in for Kaggle's server, whose answers are scripted; the real client speaks to it, and nothing waits."""

import errno
import json
import shutil
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import quote, unquote

import backbone
import bundle
import layout

OWNER = "tester"
KEY = "0123456789abcdef0123456789abcdef"
TOKEN = "KGAT_fedcba9876543210"
NOT_FOUND = (404, {"message": "not found"})
QUEUED, RUNNING, COMPLETE, CANCELLED, ERROR = (
    {"status": status} for status in ("QUEUED", "RUNNING", "COMPLETE", "CANCEL_ACKNOWLEDGED", "ERROR")
)
PROGRESS = "[fold0] train fold0:  45%|####5     | 730/1616 [10:00<12:00, 1.2step/s]"


class StandIn(ThreadingHTTPServer):
    """Keeps every request and every uploaded file.

    `script`: method -> its next answers, each used once, the last one for good: a dictionary, a status code with one,
    or both with headers. Without a script a method is answered as a healthy Kaggle does.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.calls: list[tuple[str, dict]] = []
        self.uploads: dict[str, bytes] = {}
        self.data_sets: dict[str, int] = {}  # owner/slug -> version
        self.script: dict[str, list] = {}
        self.output: dict[str, bytes] = {}  # name of a file in the kernels' output -> its content
        self.broken: dict[str, int] = {}  # name -> how often its download breaks off in the middle
        self.log: list[str] = []  # of the kernels
        self.page = 1000  # files on a page of the output
        self.ranges: list[str] = []
        self.silent = False  # no answer for a second

    def answer(self, method: str, body: dict) -> tuple:
        self.calls.append((method, body))
        if method in self.script:
            answers = self.script[method]
            answer = answers.pop(0) if len(answers) > 1 else answers[0]
            return answer if isinstance(answer, tuple) else (200, answer)
        ok = {"status": "ok", "url": "https://www.kaggle.com/x", "error": "", "ref": "x"}
        name = f"{body.get('ownerSlug')}/{body.get('datasetSlug', body.get('slug'))}"
        if method == "GetDatasetStatus":
            return (200, {"status": "READY"}) if name in self.data_sets else NOT_FOUND
        if method == "GetDataset":
            return 200, {"currentVersionNumber": self.data_sets.get(name, 0)}
        if method == "IntrospectToken":
            good = body["token"] == TOKEN
            return (200, {"active": True, "username": OWNER}) if good else (400, {"message": "no such token"})
        if method == "StartBlobUpload":
            return 200, {"token": f"token-{body['name']}", "createUrl": f"{self.address}/upload/{body['name']}"}
        if method in ("CreateDataset", "CreateDatasetVersion"):
            self.data_sets[name] = self.data_sets.get(name, 0) + 1
        if method == "SaveKernel":
            return 200, {"url": "https://www.kaggle.com/x", "versionNumber": 7}
        if method == "GetKernelSessionStatus":
            return NOT_FOUND
        if method == "GetAcceleratorQuotaStatistics":
            return 200, quota(30)
        if method == "ListKernelSessionOutput":
            return 200, self.list_output(int(body.get("pageToken") or 0))
        return 200, {"message": "Successfully submitted", **ok}

    def list_output(self, first: int) -> dict:
        names = sorted(self.output)
        files = [{"fileName": name, "url": f"{self.address}/files/{quote(name, safe='')}"} for name in names]
        more = {"nextPageToken": str(first + self.page)} if first + self.page < len(names) else {}
        return {"files": files[first : first + self.page], **more}

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"

    def sent(self, method: str) -> list[dict]:
        return [body for name, body in self.calls if name == method]

    def take_output(self, folder: Path, *left_out: str) -> None:
        """The kernel's output is what lies in a folder."""
        for path in folder.rglob("*"):
            name = path.relative_to(folder).as_posix()
            if path.is_file() and not name.startswith(left_out or ("notes",)):
                self.output[name] = path.read_bytes()


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        body = json.loads(self._read() or b"{}")
        if self.server.silent:
            threading.Event().wait(1)
            return
        self._reply(*self.server.answer(self.path.rpartition("/")[2], body))

    def do_PUT(self):
        self.server.uploads[self.path.rpartition("/")[2]] = self._read()
        self._reply(200, {})

    def do_GET(self):
        if "/logs/stream/" in self.path:
            events = [f"data: {json.dumps({'stream_name': 'stdout', 'data': line})}\n\n" for line in self.server.log]
            self._send(200, "".join([*events, "data: END_OF_LOG\n\n"]).encode(), "text/event-stream")
            return
        name = unquote(self.path.partition("/files/")[2])
        content, asked = self.server.output[name], self.headers.get("Range")
        first = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        if asked:
            self.server.ranges.append(f"{name} {asked}")
        broken = self.server.broken.get(name, 0)
        if broken:
            self.server.broken[name] = broken - 1
        rest = content[first:]
        self._send(206 if asked else 200, rest[: len(rest) // 2] if broken else rest, "application/x", len(rest))

    def _read(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def _reply(self, code: int, value: dict, headers: dict | None = None) -> None:
        self._send(code, json.dumps(value).encode(), "application/json", headers=headers)

    def _send(self, code: int, body: bytes, kind: str, length: int | None = None, headers: dict | None = None) -> None:
        self.send_response(code)
        all_headers = {"Content-Type": kind, "Content-Length": len(body) if length is None else length}
        for name, value in {**all_headers, **(headers or {})}.items():
            self.send_header(name, str(value))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *arguments):
        pass


def quota(hours: float, used: float = 0.0, reserved: float = 0.0) -> dict:
    """An answer on the GPU quota."""
    values = {"totalTimeAllowed": hours, "timeUsed": used, "timeReserved": reserved}
    return {"gpuQuota": {name: f"{value * 3600:.0f}s" for name, value in values.items()}}


def fill_disk(*_: object, **__: object) -> None:
    """In the place of a function that writes."""
    raise OSError(errno.ENOSPC, "No space left on device")


def write_small_library(folder: Path, commit: str) -> None:
    """In the place of `bundle.write_library`."""
    (folder / "prefcls_lib").mkdir(parents=True)
    (folder / "prefcls_lib" / "commit.txt").write_text(f"{commit}\n")


def start_stand_in(monkeypatch, folder: Path) -> StandIn:
    """It has credentials of OWNER; bundles go to dist/kaggle, quickly: a library of one file, a backbone as it is."""
    stand_in = StandIn()
    threading.Thread(target=stand_in.serve_forever, args=(0.01,), daemon=True).start()
    variables = {
        "KAGGLE_API_ENVIRONMENT": "LOCALHOST", "http_proxy": stand_in.address, "no_proxy": "127.0.0.1",
        "KAGGLE_USERNAME": OWNER, "KAGGLE_KEY": KEY, "HOME": str(folder / "home"), "TMPDIR": str(folder),
        "KAGGLE_CONFIG_DIR": str(folder / "home" / ".kaggle"),
    }  # fmt: skip
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    (folder / "home" / ".kaggle").mkdir(parents=True)
    from kaggle.api.kaggle_api_extended import KaggleApi

    monkeypatch.setattr(KaggleApi, "args", ["--local"])
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    monkeypatch.setattr(layout, "DIST", folder / "dist" / "kaggle")
    monkeypatch.setattr(bundle, "write_library", write_small_library)
    monkeypatch.setattr(backbone, "prepare_backbone", lambda name, source, target: shutil.copytree(source, target))
    return stand_in
