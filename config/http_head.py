"""What a request head may look like before any application sees it, and the answer when it does not.

llhttp already refuses most of what request smuggling is made of (both framings at once, doubled or malformed
Content-Length, obs-fold, bare LF, NUL and control bytes, a space before the colon, bad chunks). These are the rules
that it leaves to us: RFC 9112 sections 3.2, 6.1 and 6.3, RFC 9110 section 7.2. Pure: no socket, no clock.
"""

import json
import re
import uuid
from collections.abc import Iterable

HOST = re.compile(rb"(?:[A-Za-z0-9._~-]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{1,5})?")
ABSOLUTE_FORM = re.compile(rb"https?://([^/?#@]+)(/[^#]*)?", re.IGNORECASE)
GUARDED = frozenset(
    (b"host", b"authorization", b"transfer-encoding", b"content-length", b"upgrade", b"expect")
)
REASONS = {
    400: b"Bad Request",
    405: b"Method Not Allowed",
    408: b"Request Timeout",
    431: b"Request Header Fields Too Large",
}
CODES = {408: "request_timeout", 431: "request_too_large"}
ALLOWED_METHODS = b"GET, HEAD, POST, PUT, PATCH, DELETE, OPTIONS"
# The WebSocket library reads the head again, with these bounds of its own (websockets.http11), less a little.
WEBSOCKET_LINE_BYTES = 8000
WEBSOCKET_HEADERS = 120


class RequestRefused(Exception):
    """A request that gets one answer from the server itself, after which the connection closes.

    ``status`` is one of ``REASONS``; ``message`` is for the caller and never repeats what the caller sent.
    """

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.message = message


class Head:
    """The few facts of one request head that decide how, and whether, it is answered."""

    # Defaults of the class, since most requests change one of them and every request has a Head.
    host: bytes | None = None
    authorized = False
    body = False  # A body is announced: chunked, or a Content-Length above zero.
    chunked = False
    upgrades: tuple[bytes, ...] = ()
    expects_continue = False

    def note(self, name: bytes, value: bytes) -> None:
        """Take in one of the ``GUARDED`` headers; ``name`` is in lower case. Raises ``RequestRefused``."""
        if name == b"host":
            self._note_host(value)
        elif name == b"authorization":
            if self.authorized:
                raise RequestRefused(400, "The request has more than one Authorization header.")
            self.authorized = True
        elif name == b"content-length":
            # llhttp has checked that it is one number; a longer string of zeros is still zero.
            self.body = self.body or value.strip().strip(b"0") != b""
        elif name == b"transfer-encoding":
            self._note_transfer_encoding(value)
        elif name == b"upgrade":
            self.upgrades += (value.strip().lower(),)
        elif value.lower() == b"100-continue":
            self.expects_continue = True

    def _note_host(self, value: bytes) -> None:
        if self.host is not None:
            raise RequestRefused(400, "The request has more than one Host header.")
        if HOST.fullmatch(value) is None:
            raise RequestRefused(400, "The Host header is not a host name or address with an optional port.")
        self.host = value

    def _note_transfer_encoding(self, value: bytes) -> None:
        # llhttp refuses other codings only after it has announced the complete head, when an application could
        # already be answering; and it lets "gzip, chunked" through, which nobody here would decode.
        if value.strip().lower() != b"chunked":
            raise RequestRefused(400, "The only Transfer-Encoding understood is chunked.")
        self.body = self.chunked = True

    def wants_websocket(self, *, method: str) -> bool:
        """Whether an upgrade that llhttp saw is one that is served; any other is ignored."""
        return self.upgrades == (b"websocket",) and method == "GET"

    @property
    def offers_http2(self) -> bool:
        """Whether it only offers to speak HTTP/2, as Java's client does in the first request of a connection."""
        return self.upgrades == (b"h2c",)

    def check(self, *, method: str, version: str, upgrade: bool) -> None:
        """Judge the complete head. Raises ``RequestRefused``."""
        if version not in ("1.1", "1.0"):
            raise RequestRefused(400, "Only HTTP/1.1 and HTTP/1.0 are spoken here.")
        if method in ("TRACE", "CONNECT"):
            raise RequestRefused(405, f"{method} is not allowed.")
        if self.host is None:
            raise RequestRefused(400, "The request has no Host header.")
        if self.chunked and version == "1.0":
            raise RequestRefused(400, "An HTTP/1.0 request cannot be chunked.")
        if upgrade and self.body and not self.offers_http2:
            # llhttp takes what follows such a head for the new protocol, so the body would be read as requests.
            raise RequestRefused(400, "A request that asks for an upgrade cannot have a body.")


def origin_form(url: bytes, *, host: bytes | None) -> bytes:
    """The request target as path and query. An absolute target must name the same host as the Host header."""
    if b"#" in url:
        raise RequestRefused(400, "The request target has a fragment.")
    if url.startswith(b"/"):
        return url
    absolute = ABSOLUTE_FORM.fullmatch(url)
    if absolute is None or host is None or absolute[1].lower() != host.lower():
        raise RequestRefused(
            400, "The request target is not a path, or names another host than the Host header."
        )
    return absolute[2] or b"/"


def require_utf8(value: bytes) -> None:
    """Refuse a header value outside ASCII that is not UTF-8 either."""
    try:
        value.decode("utf-8")
    except UnicodeDecodeError:
        raise RequestRefused(400, "A header value is not valid UTF-8.") from None


def require_websocket_bounds(url: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    """Refuse what the WebSocket library would not read, where an answer is still possible."""
    longest = max((len(name) + len(value) for name, value in headers), default=0)
    if len(headers) > WEBSOCKET_HEADERS or max(longest, len(url)) > WEBSOCKET_LINE_BYTES:
        raise RequestRefused(431, "The head of a WebSocket request is limited to 120 lines of 8000 bytes.")


def error_body(message: str, *, kind: str, code: str, request_id: str) -> bytes:
    """The error shape of the data plane, as JSON bytes."""
    error = {"message": message, "type": kind, "param": None, "code": code}
    return json.dumps({"error": error, "request_id": request_id}, separators=(",", ":")).encode()


def error_headers(body: bytes, *, request_id: str) -> list[tuple[bytes, bytes]]:
    """The headers of an answer that the server gives by itself; it always closes the connection."""
    return [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"cache-control", b"no-store"),
        (b"x-request-id", request_id.encode()),
        (b"connection", b"close"),
    ]


def refusal_response(refused: RequestRefused, *, default_headers: Iterable[tuple[bytes, bytes]]) -> bytes:
    """One whole HTTP response for a refused request."""
    request_id = uuid.uuid4().hex
    code = CODES.get(refused.status, "invalid_request")
    body = error_body(refused.message, kind="invalid_request_error", code=code, request_id=request_id)
    headers = [*default_headers, *error_headers(body, request_id=request_id)]
    if refused.status == 405:
        headers.append((b"allow", ALLOWED_METHODS))
    lines = [b"HTTP/1.1 %d %s\r\n" % (refused.status, REASONS[refused.status])]
    lines += [b"%s: %s\r\n" % header for header in headers]
    return b"".join([*lines, b"\r\n", body])
