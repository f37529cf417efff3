"""Requests to an OpenAI-compatible server: bounded retries, a shared pause when it asks for one, a rate limit.

Standard library only and no sibling imports, since the judge in the parent process uses it as well as the worker. The
key is sent only to the configured server: redirects are refused, and messages never contain it.
"""

import email.utils
import http.client
import itertools
import json
import os
import queue
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Generic, NoReturn, TypeVar

Item = TypeVar("Item")
Value = TypeVar("Value")

MAX_BODY_BYTES = 64 << 20  # of one response; 32,768 tokens of text are a few hundred kB
FIRST_BACKOFF_S = 0.5  # doubled with each failure of a request
MAX_BACKOFF_S = 30.0
MAX_WAIT_S = 600.0  # that a server may ask for; a longer one ends the run, which can be started again later
MAX_THROTTLED = 100  # times that one request may be told to wait
MAX_MESSAGE_CHARACTERS = 300  # of a message that quotes the server
BURST_S = 1.0  # the token bucket of the rate limit holds as many requests as arrive in this time
TRANSIENT = (408, 409, 425, 429, 500, 502, 503, 504, 529)
FATAL = (401, 402, 404, 405)  # every other request would fail too


class ServerError(Exception):
    """A request failed for good; its message is one line without the key."""


class RequestRefused(ServerError):
    """The server refuses this request; others may succeed."""


class RequestForbidden(RequestRefused):
    """Status 403: from a gateway that moderates texts it concerns this request only, with a wrong key every request."""


class RequestUnanswered(ServerError):
    """No attempt at this request got a usable response."""


class ServerUnusable(ServerError):
    """No request can succeed now: wrong address, key or model, or the server asks for too long a wait."""


class _TransientError(Exception):
    """This attempt failed; another may succeed."""

    def __init__(self, message: str, *, throttled: bool = False, wait_s: float = 0.0) -> None:
        super().__init__(message)
        self.throttled = throttled
        self.wait_s = wait_s


@dataclass(frozen=True)
class ServerAccess:
    url: str  # up to and including "/v1"
    key_variable: str | None  # environment variable that holds the key; None: no key is sent
    timeout_s: float  # for one attempt, from the connection to the last byte
    retries: int  # more attempts after a transient failure
    requests_per_minute: float | None = None  # None: no limit


class ServerClient:
    """Sends JSON and receives JSON. Thread-safe."""

    def __init__(
        self,
        access: ServerAccess,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Raises ServerUnusable when the environment variable of the key is not set."""
        self._access = access
        self._key = _read_key(access.key_variable)
        self._clock, self._sleep = clock, sleep
        self._rate_limiter = RateLimiter(access.requests_per_minute, clock, sleep)
        self._opener = urllib.request.build_opener(_NoRedirect)

    def post(self, path: str, body: Mapping[str, Any], read: Callable[[Any], Any] = lambda response: response) -> Any:
        """Posts `body` and returns `read(response)`.

        Args:
          path: below the base URL, such as "completions".
          read: raises KeyError, IndexError, TypeError or ValueError for a malformed response, which counts as a
            transient failure. Its message may quote the response, but not cut it: half a key would not be masked.

        Raises:
          RequestRefused: the server refuses this request; RequestForbidden: it may refuse every request.
          RequestUnanswered: `retries` more attempts failed too.
          ServerUnusable: every other request would fail too.
        """
        failures = throttled = 0
        while True:
            self._rate_limiter.wait()
            try:
                return self._attempt_and_read(path, body, read)
            except _TransientError as failure:
                throttled += failure.throttled
                failures += not failure.throttled
                if failures > self._access.retries or throttled > MAX_THROTTLED:
                    count = failures + throttled
                    attempts = f"{count} attempts" if count > 1 else "the only attempt"
                    raise RequestUnanswered(f"{failure} ({attempts})") from None
                self._wait_after(failure, failures + throttled)

    def _wait_after(self, failure: _TransientError, count: int) -> None:
        if failure.wait_s > MAX_WAIT_S:
            raise ServerUnusable(
                f"{failure}; the server asks to wait {failure.wait_s:,.0f} s: start the run again after that, answers "
                "so far are kept"
            ) from None
        backoff = min(MAX_BACKOFF_S, FIRST_BACKOFF_S * 2 ** min(count - 1, 10)) * random.uniform(0.5, 1.0)
        if failure.throttled:  # all threads wait: more requests would be refused too
            self._rate_limiter.pause(max(failure.wait_s, backoff))
        else:
            self._sleep(backoff)

    def _attempt_and_read(self, path: str, body: Mapping[str, Any], read: Callable[[Any], Any]) -> Any:
        """One attempt. Every error that quotes the server passes through here, where the key is masked."""
        try:
            return _read_checked(read, self._attempt(path, body))
        except (_TransientError, ServerError) as error:
            error.args = (self._masked(str(error)),)
            raise

    def _attempt(self, path: str, body: Mapping[str, Any]) -> Any:
        headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"
        url = f"{self._access.url.rstrip('/')}/{path}"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        deadline = self._clock() + self._access.timeout_s
        try:
            with self._opener.open(request, timeout=self._access.timeout_s) as response:
                return _parsed(self._read_body(response, deadline))
        except urllib.error.HTTPError as error:
            self._raise_for_status(error)
        except (OSError, http.client.HTTPException) as error:  # URLError, timeouts and resets are OSErrors
            reason = getattr(error, "reason", None) or error
            raise _TransientError(f"{url}: {type(error).__name__}: {reason}") from None

    def _read_body(self, response: http.client.HTTPResponse, deadline: float) -> bytes:
        """The whole body, unless it comes too slowly or never ends."""
        pieces: list[bytes] = []
        size = 0
        while piece := response.read1(1 << 16):
            pieces.append(piece)
            size += len(piece)
            if size > MAX_BODY_BYTES:
                raise _TransientError(f"the response is longer than {MAX_BODY_BYTES:,} bytes")
            if self._clock() > deadline:
                raise _TransientError(f"no complete response within {self._access.timeout_s:g} s")
        missing = response.length  # of what Content-Length promised
        if missing:
            raise _TransientError(f"the response ended {missing:,} bytes early")
        return b"".join(pieces)

    def _raise_for_status(self, error: urllib.error.HTTPError) -> NoReturn:
        with error:
            message = f"HTTP {error.code}: {_error_message(error)}"
        if error.code in FATAL or 300 <= error.code < 400:
            raise ServerUnusable(f"{self._access.url}: {message}") from None
        if error.code == 403:
            raise RequestForbidden(message) from None
        if error.code in TRANSIENT:
            wait_s = _retry_after(error.headers.get("Retry-After"))
            raise _TransientError(
                message, throttled=error.code == 429 or wait_s is not None, wait_s=wait_s or 0.0
            ) from None
        raise RequestRefused(message) from None

    def _masked(self, text: str) -> str:
        """`text` on one line, with any copy of the key masked, then cut: in this order no half key is left."""
        line = " ".join(text.split())
        for spelling in _spellings(self._key):
            line = line.replace(spelling, "***")
        return line if len(line) <= MAX_MESSAGE_CHARACTERS else f"{line[:MAX_MESSAGE_CHARACTERS]}..."


@dataclass(frozen=True)
class Finished(Generic[Item, Value]):
    """One call of `in_parallel`: the item, and its value or the error that it raised."""

    item: Item
    value: Value | None
    error: Exception | None


def in_parallel(call: Callable[[Item], Value], items: Iterable[Item], threads: int) -> Iterator[Finished[Item, Value]]:
    """Calls `call` on every item, `threads` at a time; yields them as they finish.

    Items are drawn as they are needed. When the caller stops early, running calls are abandoned: the threads are
    daemons, so they never keep a process from exiting.
    """
    tasks: queue.SimpleQueue[Item] = queue.SimpleQueue()
    results: queue.SimpleQueue[Finished[Item, Value]] = queue.SimpleQueue()
    stopped = threading.Event()

    def work() -> None:
        while True:
            item = tasks.get()
            if stopped.is_set():
                return
            try:
                results.put(Finished(item, call(item), None))
            except Exception as error:
                results.put(Finished(item, None, error))

    remaining = iter(items)
    in_flight = 0
    for _ in range(threads):
        threading.Thread(target=work, daemon=True).start()
    try:
        while True:
            for item in itertools.islice(remaining, threads - in_flight):
                tasks.put(item)
                in_flight += 1
            if not in_flight:
                return
            finished = results.get()
            in_flight -= 1
            yield finished
    finally:
        stopped.set()
        for _ in range(threads):
            tasks.put(None)  # type: ignore[arg-type]  # wakes a thread, which then exits


class RateLimiter:
    """At most `per_minute` requests a minute (a token bucket), and none while it is paused."""

    def __init__(self, per_minute: float | None, clock: Callable[[], float], sleep: Callable[[float], None]) -> None:
        self._spacing_s = 60.0 / per_minute if per_minute is not None else 0.0
        self._clock, self._sleep = clock, sleep
        self._lock = threading.Lock()
        self._next = self._paused_until = clock()  # when the next token is due

    def wait(self) -> None:
        """Returns when the caller may send one request."""
        while (remaining := self._take_token()) > 0:
            self._sleep(remaining)

    def pause(self, seconds: float) -> None:
        with self._lock:
            self._paused_until = max(self._paused_until, self._clock() + seconds)

    def _take_token(self) -> float:
        """0 if there was a token, else the seconds after which to try again."""
        with self._lock:
            now = self._clock()
            free_at = max(self._next, self._paused_until)
            if free_at <= now:
                self._next = max(self._next, now - BURST_S) + self._spacing_s
            return free_at - now


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would send the key to an address that nobody configured."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _read_key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ServerUnusable(f"the environment variable {variable}, which should hold the server's key, is not set")
    if not (key.isascii() and key.isprintable()):  # not valid in a header, and the error would show it
        raise ServerUnusable(
            f"the environment variable {variable} is not a valid key: printable ASCII on one line is expected"
        )
    return key


def _spellings(key: str | None) -> list[str]:
    """The key itself, as JSON, and the `repr` of both; longest first."""
    if key is None:
        return []
    plain = {key, json.dumps(key)[1:-1]}
    shown = {spelling.replace("\\", "\\\\") for spelling in plain}
    quoted = {spelling.replace("'", "\\'") for spelling in shown}
    return sorted(plain | shown | quoted, key=len, reverse=True)


def _parsed(body: bytes) -> Any:
    try:
        return json.loads(body)
    except (ValueError, RecursionError):
        raise _TransientError(f"the response is not JSON: {body.decode(errors='replace')!r}") from None


def _read_checked(read: Callable[[Any], Any], response: Any) -> Any:
    try:
        return read(response)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise _TransientError(f"unexpected response: {type(error).__name__}: {error}") from None


def _error_message(error: urllib.error.HTTPError) -> str:
    """The message in an error's body, in the form of OpenAI's API, or the start of the body."""
    try:
        body = error.read(1 << 16)
    except (OSError, http.client.HTTPException):
        return str(error.reason)
    try:
        answer = json.loads(body)
        inner = answer.get("error", answer)
        return str(inner["message"] if isinstance(inner, dict) else inner)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return body.decode(errors="replace") or str(error.reason)


def _retry_after(header: str | None) -> float | None:
    """Seconds; the header is a number of them or a date. None where it is absent or unreadable."""
    if header is None:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except (ValueError, TypeError):
        return None
