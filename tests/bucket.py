"""A stand-in of Google Cloud Storage: enough of its JSON API for gcsfs, tensorstore and its client.

Objects are in memory. It keeps what a bucket promises: an object is there whole or not at all, a
list shows what was put before, and a precondition on a generation is held.
"""

import contextlib
import itertools
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

NAME = "bucket"
_BUCKET = rf"/(?:storage/v1|upload/storage/v1|download/storage/v1)/b/{NAME}"


class Bucket(ThreadingHTTPServer):
    """The server; `objects` holds each object's content and generation by its name."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, tuple[bytes, int]] = {}
        self.uploads: dict[str, tuple[str, bytearray]] = {}
        self.numbers = itertools.count(1)
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def save(self, folder: Path) -> None:
        """Write all objects as files of a folder."""
        for name, (content, _) in self.objects.items():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(content)

    @property
    def environment(self) -> dict[str, str]:
        """What makes the clients of a process speak to it, and with no one else."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GCE_METADATA_ROOT": "127.0.0.1:1",
            "NO_GCE_CHECK": "true",
            "GOOGLE_CLOUD_PROJECT": "none",
            "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # it would ask by gRPC, elsewhere
            "no_proxy": "127.0.0.1",
        }


@contextlib.contextmanager
def serve() -> Iterator[Bucket]:
    """One that answers until the end of the block."""
    with Bucket() as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


class _Handler(BaseHTTPRequestHandler):
    server: Bucket
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # an answer in one piece: for the second one of two, clients make it wait
    disable_nagle_algorithm = True

    def handle(self) -> None:
        with contextlib.suppress(ConnectionError):  # a client that asked twice at once has gone
            super().handle()

    def log_message(self, *_: Any) -> None:
        pass

    def _send(self, code: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def _tell(self, content: dict[str, Any], code: int = 200, **headers: str) -> None:
        self._send(code, json.dumps(content).encode(), Content_Type="application/json", **headers)

    def _refuse(self, code: int) -> None:
        self._tell({"error": {"code": code, "message": str(code)}}, code)

    def _about(self, name: str) -> dict[str, Any]:
        content, generation = self.server.objects[name]
        return {
            "kind": "storage#object",
            "bucket": NAME,
            "name": name,
            "size": str(len(content)),
            "generation": str(generation),
            "metageneration": "1",
            "timeCreated": "2026-01-01T00:00:00.000Z",
            "updated": "2026-01-01T00:00:00.000Z",
        }

    def _holds(self, name: str) -> bool:
        """Do the preconditions hold? Where not, the answer is sent."""
        now = self.server.objects.get(name, (b"", 0))[1]
        for key, wanted, code in (("Match", True, 412), ("NotMatch", False, 304)):
            asked = self.query.get(f"ifGeneration{key}")
            if asked is not None and (int(asked) == now) != wanted:
                self._send(code) if code == 304 else self._refuse(code)
                return False
        return True

    def _put(self, name: str, content: bytes) -> None:
        if self._holds(name):
            self.server.objects[name] = content, next(self.server.numbers)
            self._tell(self._about(name))

    def _any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Transfer-Encoding") == "chunked":
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        parts = urlsplit(self.path)
        self.query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
        with self.server.lock:
            if re.fullmatch(_BUCKET, parts.path):
                self._tell({"kind": "storage#bucket", "name": NAME, "id": NAME})
            elif re.fullmatch(f"{_BUCKET}/o", parts.path):
                self._list() if self.command == "GET" else self._upload(body)
            elif match := re.fullmatch(f"{_BUCKET}/o/([^/]+)", parts.path):
                self._object(unquote(match[1]))
            elif match := re.fullmatch(
                f"{_BUCKET}/o/([^/]+)/(?:rewriteTo/b/{NAME}|moveTo)/o/([^/]+)", parts.path
            ):
                self._copy(*map(unquote, match.groups()), move="/moveTo/" in parts.path)
            else:
                self._refuse(404)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _any

    def _list(self) -> None:
        prefix, delimiter = self.query.get("prefix", ""), self.query.get("delimiter")
        start, end = self.query.get("startOffset", ""), self.query.get("endOffset")
        names = [
            name
            for name in sorted(self.server.objects)
            if name.startswith(prefix) and start <= name and (end is None or name < end)
        ]
        folders: set[str] = set()
        if delimiter:
            rest = {name: name[len(prefix) :].partition(delimiter) for name in names}
            folders = {prefix + first + delimiter for first, cut, _ in rest.values() if cut}
            names = [name for name in names if not rest[name][1]]
        self._tell(
            {
                "kind": "storage#objects",
                "items": [self._about(name) for name in names],
                "prefixes": sorted(folders),
            }
        )

    def _object(self, name: str) -> None:
        if name not in self.server.objects:
            self._refuse(404)
        elif self.command == "DELETE":
            if self._holds(name):
                del self.server.objects[name]
                self._send(204)
        elif self.query.get("alt") != "media":
            self._tell(self._about(name))
        elif self._holds(name):
            content, generation = self.server.objects[name]
            headers = {"x_goog_generation": str(generation), "x_goog_metageneration": "1"}
            match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            if not match:
                self._send(200, content, **headers)
                return
            first, last = int(match[1]), int(match[2] or len(content) - 1)
            last = min(last, len(content) - 1)
            if first > last:
                self._refuse(416)
                return
            headers["Content_Range"] = f"bytes {first}-{last}/{len(content)}"
            self._send(206, content[first : last + 1], **headers)

    def _copy(self, old: str, new: str, move: bool) -> None:
        if old not in self.server.objects:
            self._refuse(404)
            return
        self.server.objects[new] = self.server.objects[old][0], next(self.server.numbers)
        about = self._about(new)
        if move:
            del self.server.objects[old]
            self._tell(about)
        else:
            size = {"totalBytesRewritten": about["size"], "objectSize": about["size"]}
            self._tell({"done": True, "resource": about, **size})

    def _upload(self, body: bytes) -> None:
        kind = self.query["uploadType"]
        if kind == "media":
            self._put(self.query["name"], body)
        elif kind == "multipart":
            edge = re.search(r"boundary=\"?([^\";]+)", self.headers["Content-Type"])[1].encode()
            _, about, content = body.split(b"--" + edge)[:3]
            name = json.loads(re.split(rb"\r?\n\r?\n", about, maxsplit=1)[1])["name"]
            content = re.split(rb"\r?\n\r?\n", content, maxsplit=1)[1]
            self._put(name, re.sub(rb"\r?\n\Z", b"", content))
        elif "upload_id" not in self.query:
            name = self.query.get("name") or json.loads(body)["name"]
            number = str(next(self.server.numbers))
            self.server.uploads[number] = name, bytearray()
            self._tell({}, Location=f"{self.server.url}{self.path}&upload_id={number}")
        else:  # a piece; the object is there when the last one has come
            name, content = self.server.uploads[self.query["upload_id"]]
            content += body
            if self.headers["Content-Range"].endswith("/*"):
                self._tell({}, 308, Range=f"bytes=0-{len(content) - 1}")
            else:
                self._put(name, bytes(content))
