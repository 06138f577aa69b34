"""A real HTTP server of files for tests: with ranges, and able to stall, to cut and to lie."""

import base64
import hashlib
import re
import threading
import time
from collections import defaultdict
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import quote, unquote, urlsplit


class Server(ThreadingHTTPServer):
    """files      {name: bytes}; a folder's page lists what lies in it.
    faults     {name: [what happens to its first GET, to its second, ...]}: an HTTP status, `cut` (half of the body), `stall`
               (half, then nothing), `flip` (other bytes, as many), `short` (fewer bytes, as if that were all), or `refuse`.
    ranges     true, false (always the whole), or `lies`: another range than was asked for.
    md5        send Content-MD5.  lists: whether folders have pages.
    delay_s    before each answer.  mb_per_s: most of one connection, 0: no limit.
    asked      [method, name, Range header] of each request.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, files):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.files, self.faults = files, defaultdict(list)
        self.ranges, self.md5, self.lists, self.password = True, False, True, None
        self.delay_s, self.mb_per_s = 0.0, 0.0
        self.asked, self.goes_on = [], threading.Event()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request, client_address):
        """A client that hangs up is no news."""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = -1  # headers and body in one packet
    disable_nagle_algorithm = True

    def log_message(self, *words):
        """Tests read what fastrot says."""

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        server, name = self.server, unquote(urlsplit(self.path).path)[1:]
        asked = self.headers.get("Range")
        server.asked.append((self.command, name, asked))
        time.sleep(server.delay_s)
        if (
            server.password
            and self.headers.get("Authorization") != "Basic " + base64.b64encode(server.password).decode()
        ):
            return self._say(401)
        if name not in server.files:
            return self._folder(name)
        get = self.command == "GET"
        fault = server.faults[name].pop(0) if get and server.faults[name] else None
        if isinstance(fault, int):
            return self._say(fault)
        content = server.files[name]
        headers = {
            "ETag": f'"{hash(content):x}"',  # which bytes remember
            "Last-Modified": "Sun, 06 Nov 1994 08:49:37 GMT",
        }
        if server.md5:
            headers["Content-MD5"] = base64.b64encode(hashlib.md5(content).digest()).decode()
        status, body = 200, content
        if asked and server.ranges:
            first, last = map(int, re.fullmatch(r"bytes=(\d+)-(\d+)", asked).groups())
            if first >= len(content):
                return self._say(416, {"Content-Range": f"bytes */{len(content)}"})
            if server.ranges == "lies":
                first, last = first + 1, last + 1
            last = min(last, len(content) - 1)
            status, body = 206, memoryview(content)[first : last + 1]
            headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        if fault == "flip":
            body = bytes(b ^ 255 for b in body)
        if fault == "short":
            body = body[: len(body) // 2]
        self._say(status, headers, body, fault if fault in ("cut", "stall") else None)

    def _folder(self, name):
        inside = {rest.partition("/")[0] + "/" * ("/" in rest)
                  for rest in (n.removeprefix(name) for n in self.server.files if n.startswith(name))}  # fmt: skip
        if not inside or not (name.endswith("/") or not name or any(i.startswith("/") for i in inside)):
            return self._say(404)
        if name and not name.endswith("/"):
            return self._say(301, {"Location": f"/{quote(name)}/"})
        links = "".join(f'<li><a href="{quote(one)}">{one}</a></li>' for one in sorted(inside))
        page = f"<html><a href='../'>up</a><a href='?C=N'>sort</a>{links if self.server.lists else 'hello'}</html>"
        return self._say(200, {"Content-Type": "text/html"}, page.encode())

    def _say(self, status, headers=None, body=b"", fault=None):
        self.send_response(status)
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        self._write(body[: len(body) // 2] if fault else body)
        if fault:
            self.wfile.flush()
            if fault == "stall":
                self.server.goes_on.wait()
            self.close_connection = True

    def _write(self, body):
        pace = self.server.mb_per_s
        some = 250_000 if pace else len(body) or 1
        for at in range(0, len(body), some):
            time.sleep(some / 1e6 / pace if pace else 0)
            self.wfile.write(body[at : at + some])


@contextmanager
def serving(files):
    """A server of {name: bytes} while the block runs."""
    server = Server(dict(files))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.goes_on.set()
        server.shutdown()
        server.server_close()
        thread.join()
