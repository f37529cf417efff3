"""Requests to an OpenAI-compatible server: bounded retries, a shared pause when it asks for one, a rate limit.

Standard library only, and no import of a sibling: the worker uses it, and so does the judge in the parent's process.
The key is sent to the configured server and nowhere else: redirects are refused, and messages never carry it.
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

MAX_BODY_BYTES = 64 << 20  # of one answer; 32,768 tokens of text are a few hundred kB
FIRST_BACKOFF_S = 0.5  # doubled with each failure of a request
LONGEST_BACKOFF_S = 30.0
LONGEST_WAIT_S = 600.0  # that a server may ask for; a longer one ends the run, which continues when it is started again
MOST_THROTTLED = 100  # times that one request is asked to wait
SHOWN = 300  # characters of a message with a server's own words
CREDIT_S = 1.0  # the rate limit's bucket holds as many requests as it gets in this time
PASSING = (408, 409, 425, 429, 500, 502, 503, 504, 529)
HOPELESS = (401, 402, 404, 405)  # no request will fare better


class ServerError(Exception):
    """A request failed for good; its message is one line without the key."""


class RequestRefused(ServerError):
    """The server says no to this request; others may fare better."""


class RequestForbidden(RequestRefused):
    """Status 403: a gateway that moderates texts means this request alone, one that dislikes the key means all."""


class RequestUnanswered(ServerError):
    """No attempt at this request brought an answer."""


class ServerUnusable(ServerError):
    """No request can succeed now: wrong address, key or model, or a wait that is too long."""


class _Passing(Exception):
    """An attempt failed and another may not."""

    def __init__(self, message: str, *, throttled: bool = False, wait_s: float = 0.0) -> None:
        super().__init__(message)
        self.throttled = throttled
        self.wait_s = wait_s


@dataclass(frozen=True)
class ServerAccess:
    url: str  # up to and with "/v1"
    key_variable: str | None  # environment variable with the key; None: no key is sent
    timeout_s: float  # for one attempt, from the connection to the last byte
    retries: int  # attempts after the first, of failures that may pass
    requests_per_minute: float | None = None  # None: no limit


class ServerClient:
    """Sends JSON and receives JSON; may be called from many threads."""

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
        self._turnstile = RateLimiter(access.requests_per_minute, clock, sleep)
        self._opener = urllib.request.build_opener(_NoRedirect)

    def post(self, path: str, body: Mapping[str, Any], read: Callable[[Any], Any] = lambda answer: answer) -> Any:
        """What `read` makes of the JSON that answers `body`.

        Args:
          path: below the base URL, such as "completions".
          read: raises KeyError, IndexError, TypeError or ValueError when the answer is not what it should be; that
            counts as a failure that may pass. It may repeat what it found, but not cut it: half a key is not found.

        Raises:
          RequestRefused: the server does not want this request; with RequestForbidden perhaps none at all.
          RequestUnanswered: `retries` more attempts failed too.
          ServerUnusable: no other request would fare better.
        """
        failures = throttled = 0
        while True:
            self._turnstile.wait()
            try:
                return self._attempt_and_read(path, body, read)
            except _Passing as failure:
                throttled += failure.throttled
                failures += not failure.throttled
                if failures > self._access.retries or throttled > MOST_THROTTLED:
                    count = failures + throttled
                    attempts = f"{count} attempts" if count > 1 else "the only attempt"
                    raise RequestUnanswered(f"{failure} ({attempts})") from None
                self._wait_after(failure, failures + throttled)

    def _wait_after(self, failure: _Passing, count: int) -> None:
        if failure.wait_s > LONGEST_WAIT_S:
            raise ServerUnusable(
                f"{failure}; it asks to come back in {failure.wait_s:,.0f} s: start the run again then, what was "
                "answered is kept"
            ) from None
        backoff = min(LONGEST_BACKOFF_S, FIRST_BACKOFF_S * 2 ** min(count - 1, 10)) * random.uniform(0.5, 1.0)
        if failure.throttled:  # everybody waits: more requests would only be refused too
            self._turnstile.close_for(max(failure.wait_s, backoff))
        else:
            self._sleep(backoff)

    def _attempt_and_read(self, path: str, body: Mapping[str, Any], read: Callable[[Any], Any]) -> Any:
        """One attempt. Every error that repeats words of the server leaves here, where they lose the key."""
        try:
            return _read_checked(read, self._attempt(path, body))
        except (_Passing, ServerError) as error:
            error.args = (self._said(str(error)),)
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
            raise _Passing(f"{url}: {type(error).__name__}: {reason}") from None

    def _read_body(self, response: http.client.HTTPResponse, deadline: float) -> bytes:
        """The whole body; a server that drips bytes or never ends is given up."""
        pieces: list[bytes] = []
        size = 0
        while piece := response.read1(1 << 16):
            pieces.append(piece)
            size += len(piece)
            if size > MAX_BODY_BYTES:
                raise _Passing(f"the answer is longer than {MAX_BODY_BYTES:,} bytes")
            if self._clock() > deadline:
                raise _Passing(f"no complete answer within {self._access.timeout_s:g} s")
        missing = response.length  # what Content-Length promised and did not come
        if missing:
            raise _Passing(f"the answer ended {missing:,} bytes early")
        return b"".join(pieces)

    def _raise_for_status(self, error: urllib.error.HTTPError) -> NoReturn:
        with error:
            message = f"HTTP {error.code}: {_words_of(error)}"
        if error.code in HOPELESS or 300 <= error.code < 400:
            raise ServerUnusable(f"{self._access.url}: {message}") from None
        if error.code == 403:
            raise RequestForbidden(message) from None
        if error.code in PASSING:
            wait_s = _retry_after(error.headers.get("Retry-After"))
            raise _Passing(message, throttled=error.code == 429 or wait_s is not None, wait_s=wait_s or 0.0) from None
        raise RequestRefused(message) from None

    def _said(self, text: str) -> str:
        """One line, cut, in which the key, should a server repeat it, is not readable: cut first, half would be."""
        line = " ".join(text.split())
        for spelling in _spellings(self._key):
            line = line.replace(spelling, "***")
        return line if len(line) <= SHOWN else f"{line[:SHOWN]}..."


@dataclass(frozen=True)
class Finished(Generic[Item, Value]):
    """One call of `in_parallel`: its value, or the error that it raised."""

    item: Item
    value: Value | None
    error: Exception | None


def in_parallel(call: Callable[[Item], Value], items: Iterable[Item], threads: int) -> Iterator[Finished[Item, Value]]:
    """Calls `call` on every item, `threads` at a time; yields them as they finish.

    Items are taken as they are needed. When the caller stops early, calls under way are left to themselves: the threads
    are daemons, so that they never keep a process from ending.
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
    under_way = 0
    for _ in range(threads):
        threading.Thread(target=work, daemon=True).start()
    try:
        while True:
            for item in itertools.islice(remaining, threads - under_way):
                tasks.put(item)
                under_way += 1
            if not under_way:
                return
            finished = results.get()
            under_way -= 1
            yield finished
    finally:
        stopped.set()
        for _ in range(threads):
            tasks.put(None)  # type: ignore[arg-type]  # wakes a thread, which then ends


class RateLimiter:
    """Lets requests through: at most so many a minute (a token bucket), and none while it is closed."""

    def __init__(self, per_minute: float | None, clock: Callable[[], float], sleep: Callable[[float], None]) -> None:
        self._spacing_s = 60.0 / per_minute if per_minute is not None else 0.0
        self._clock, self._sleep = clock, sleep
        self._lock = threading.Lock()
        self._next = self._closed_until = clock()  # when the next token falls due

    def wait(self) -> None:
        """Returns when the caller may send one request."""
        while (remaining := self._take_token()) > 0:
            self._sleep(remaining)

    def close_for(self, seconds: float) -> None:
        with self._lock:
            self._closed_until = max(self._closed_until, self._clock() + seconds)

    def _take_token(self) -> float:
        """0 when there was one, else the seconds after which to ask again."""
        with self._lock:
            now = self._clock()
            free_at = max(self._next, self._closed_until)
            if free_at <= now:
                self._next = max(self._next, now - CREDIT_S) + self._spacing_s
            return free_at - now


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect would carry the key to an address that nobody configured."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _read_key(variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise ServerUnusable(f"the environment variable {variable}, which should hold the server's key, is not set")
    if not (key.isascii() and key.isprintable()):  # a header cannot carry it, and the error would show it
        raise ServerUnusable(f"the environment variable {variable} holds more than a key")
    return key


def _spellings(key: str | None) -> list[str]:
    """The key as it is, as JSON has it, and either as Python shows it, the longest first."""
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
        raise _Passing(f"the answer is not JSON: {body.decode(errors='replace')!r}") from None


def _read_checked(read: Callable[[Any], Any], answer: Any) -> Any:
    try:
        return read(answer)
    except (KeyError, IndexError, TypeError, ValueError) as error:
        raise _Passing(f"the answer is not as expected: {type(error).__name__}: {error}") from None


def _words_of(error: urllib.error.HTTPError) -> str:
    """The message in an error's body, as servers of this kind write it, or the body's start."""
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
    """Seconds: the header is a number of them or a date. None where it is absent or unreadable."""
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
