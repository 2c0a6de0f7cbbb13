"""A Cloud Storage on this machine, as far as gcsfs and tensorstore (which Orbax writes arrays with) speak to one.

Objects live in memory, all in one bucket. Names and answers are those of the JSON API, version 1.
"""

import contextlib
import itertools
import json
import re
import threading
from collections.abc import Iterator
from datetime import UTC, datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, quote, unquote, urlsplit

BUCKET = "bucket"


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_):
        """A client that is gone waits for no answer."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.objects: dict[str, bytes] = {}
        self.written: dict[str, tuple[int, datetime]] = {}  # generation of each object, and when it got it
        self.generations = itertools.count(1)
        self.uploads: dict[str, bytes] = {}
        self.refused = ""  # programs with this in their names may not write
        self.lock = threading.RLock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    @property
    def environment(self) -> dict[str, str]:
        """What sends gcsfs and tensorstore here, without asking anyone who they are."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "token",
            "GCE_METADATA_HOST": "127.0.0.1:1",
            "NO_GCE_CHECK": "true",
        }


@contextlib.contextmanager
def serve() -> Iterator[Server]:
    server = Server()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Server

    def log_message(self, *_):
        pass

    def do_GET(self):
        path, query = self._asked()
        name = re.match(r".*/o/(.+)$", path)
        if name:
            self._object(unquote(name[1]), is_content=query.get("alt") == "media")
        elif re.match(r".*/o/?$", path):
            self._list(query.get("prefix", ""), query.get("delimiter", ""))
        else:
            self._answer({"kind": "storage#bucket", "name": BUCKET})

    def do_POST(self):
        path, query = self._asked()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.server.refused and self.server.refused in self.headers.get("User-Agent", ""):
            return self._answer({"error": {"code": 403, "message": "This account may not write"}}, 403)
        copy = re.match(r".*/o/(.+)/(rewriteTo|moveTo)(?:/b/[^/]+)?/o/(.+)$", path)
        if copy:
            self._copy(unquote(copy[1]), unquote(copy[3]), is_move=copy[2] == "moveTo")
        elif "/batch" in path:
            self._delete_all(unquote(name.decode()) for name in re.findall(rb"DELETE \S*/o/([^?\s]+)", body))
        elif "upload_id" in query:
            self._continue_upload(query["upload_id"], body)
        elif query.get("uploadType") == "resumable":
            self._begin_upload(query.get("name") or json.loads(body)["name"])
        elif query.get("uploadType") == "multipart":
            self._store(*self._parts(body), query.get("ifGenerationMatch"))
        else:
            self._store(query["name"], body, query.get("ifGenerationMatch"))
        return None

    do_PUT = do_POST

    def do_DELETE(self):
        path, query = self._asked()
        with self.server.lock:
            name = unquote(path.rpartition("/o/")[2])
            if not self._matches(name, query.get("ifGenerationMatch")):
                return self._refused_generation()
            self.server.objects.pop(name, None)
        return self._answer(None, 204)

    def _asked(self) -> tuple[str, dict[str, str]]:
        url = urlsplit(self.path)
        return url.path, {key: values[0] for key, values in parse_qs(url.query).items()}

    def _object(self, name: str, is_content: bool):
        content = self.server.objects.get(name)
        if content is None:
            return self._missing()
        if not is_content:
            return self._answer(self._described(name))
        headers = {"x-goog-generation": str(self._generation(name)), "x-goog-stored-content-length": str(len(content))}
        wanted = re.match(r"bytes=(\d*)-(\d*)", self.headers.get("Range", ""))
        if not wanted:
            return self._send(content, headers=headers)
        start = int(wanted[1]) if wanted[1] else max(0, len(content) - int(wanted[2]))
        part = content[start : int(wanted[2]) + 1 if wanted[1] and wanted[2] else None]
        headers["Content-Range"] = f"bytes {start}-{start + len(part) - 1}/{len(content)}"
        return self._send(part, 206, headers)

    def _list(self, prefix: str, delimiter: str):
        items, folders = [], set()
        with self.server.lock:
            for name in sorted(self.server.objects):
                if name.startswith(prefix):
                    head, found, _ = name[len(prefix) :].partition(delimiter) if delimiter else (name, "", "")
                    if found:
                        folders.add(prefix + head + delimiter)
                    else:
                        items.append(self._described(name))
        self._answer({"kind": "storage#objects", "items": items, "prefixes": sorted(folders)})

    def _copy(self, source: str, target: str, is_move: bool):
        with self.server.lock:
            if source not in self.server.objects:
                return self._missing()
            self._put(target, self.server.objects[source])
            if is_move:
                del self.server.objects[source]
        described = self._described(target)
        return self._answer(described if is_move else {"done": True, "resource": described})

    def _delete_all(self, names):
        part = "--part\r\nContent-Type: application/http\r\n\r\nHTTP/1.1 204 No Content\r\n\r\n\r\n"
        answer = ""
        with self.server.lock:
            for name in names:
                self.server.objects.pop(name, None)
                answer += part
        self._send(f"{answer}--part--".encode(), headers={"Content-Type": "multipart/mixed; boundary=part"})

    def _begin_upload(self, name: str):
        where = (
            f"{self.server.url}/upload/storage/v1/b/{BUCKET}/o?uploadType=resumable&upload_id={quote(name, safe='')}"
        )
        self.server.uploads[name] = b""
        self._send(b"", headers={"Location": where})

    def _continue_upload(self, name: str, part: bytes):
        """Content-Range says where the part belongs, and `*` for the size that it is not the last."""
        place = re.match(r"bytes (?:(\d+)-\d+|\*)/(\d+|\*)", self.headers.get("Content-Range", "bytes 0-0/0"))
        if place[1] is not None:
            self.server.uploads[name] = self.server.uploads[name][: int(place[1])] + part
        if place[2] != "*":
            self._store(name, self.server.uploads.pop(name))
        else:
            self._send(b"", 308, {"Range": f"bytes=0-{len(self.server.uploads[name]) - 1}"})

    def _parts(self, body: bytes) -> tuple[str, bytes]:
        """Of a multipart upload: the name from its JSON, and the content."""
        boundary = re.search(r'boundary="?([^";]+)', self.headers["Content-Type"])[1].encode()
        described, content = (
            re.split(rb"\r?\n\r?\n", part, maxsplit=1)[1] for part in body.split(b"--" + boundary)[1:3]
        )
        return json.loads(described)["name"], content.removesuffix(b"\n").removesuffix(b"\r")

    def _store(self, name: str, content: bytes, generation: str | None = None):
        """Store an object if the one there has the generation that the client wants, 0 for none."""
        with self.server.lock:
            if not self._matches(name, generation):
                return self._refused_generation()
            self._put(name, content)
            return self._answer(self._described(name))

    def _put(self, name: str, content: bytes):
        self.server.objects[name] = content
        self.server.written[name] = next(self.server.generations), datetime.now(UTC)

    def _generation(self, name: str) -> int:
        return self.server.written[name][0] if name in self.server.objects else 0

    def _matches(self, name: str, generation: str | None) -> bool:
        return generation is None or int(generation) == self._generation(name)

    def _refused_generation(self):
        self._answer({"error": {"code": 412, "message": "At least one of the pre-conditions did not hold"}}, 412)

    def _described(self, name: str) -> dict[str, str]:
        generation, written = self.server.written[name]
        now = written.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        size = str(len(self.server.objects[name]))
        return {
            **{"kind": "storage#object", "name": name, "bucket": BUCKET, "size": size, "generation": str(generation)},
            **{"timeCreated": now, "updated": now, "etag": str(generation)},
        }

    def _missing(self):
        self._answer({"error": {"code": 404, "message": "No such object"}}, 404)

    def _answer(self, answer: dict | None, code: int = 200):
        self._send(b"" if answer is None else json.dumps(answer).encode(), code, {"Content-Type": "application/json"})

    def _send(self, content: bytes, code: int = 200, headers: dict[str, str] | None = None):
        self.send_response(code)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)
