"""The HTTP client against a server that misbehaves in every way we could think of."""

import json
import socket
import struct
import time
from concurrent.futures import ThreadPoolExecutor
from email.utils import formatdate
from types import SimpleNamespace

import pytest
from scripted_server import Reply, json_reply, serving

from lark_jax.evaluation.worker import server_client
from lark_jax.evaluation.worker.server_client import (
    MAX_THROTTLED,
    RateLimiter,
    RequestRefused,
    RequestUnanswered,
    ServerAccess,
    ServerClient,
    ServerError,
    ServerUnusable,
)

KEY = "sk-very-secret-1234"


class FakeTime:
    """A clock that only sleeping moves."""

    def __init__(self):
        self.now, self.slept = 1_000.0, []

    def clock(self):
        return self.now

    def sleep(self, seconds):
        self.slept.append(seconds)
        self.now += seconds


def client_of(server, *, retries=2, timeout_s=5.0, key_variable=None, per_minute=None, clock=None):
    access = ServerAccess(server.url, key_variable, timeout_s, retries, per_minute)
    return ServerClient(
        access, **({"clock": clock.clock, "sleep": clock.sleep} if clock else {"sleep": lambda _: None})
    )


def after(number_of_failures, failure):
    """A script: this many failures, then a good response."""
    return lambda asked, number: failure if number < number_of_failures else json_reply({"good": asked.body})


def reset(handler):
    """The connection is reset while the client waits for the answer."""
    handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    handler.connection.close()
    handler.rfile = handler.wfile = SimpleNamespace(close=lambda: None, closed=True, flush=lambda: None)
    handler.close_connection = True


def cut_short(handler):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + b'{"good": 1')


def cut_chunk(handler):
    handler.wfile.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\nff\r\n{")


TRANSIENT = {
    "500": Reply(500, b"<html>oh</html>"),
    "502 in HTML": Reply(502, b"<html><body>Bad Gateway</body></html>"),
    "503": json_reply({"error": {"message": "loading"}}, 503),
    "429": json_reply({"error": {"message": "slow down"}}, 429),
    "429 with Retry-After": json_reply({"error": "slow down"}, 429, Retry_After="2"),
    "HTML with status 200": Reply(200, b"<html>a captive portal</html>"),
    "an empty body": Reply(200, b""),
    "cut JSON": Reply(200, b'{"good": '),
    "not UTF-8": Reply(200, b"\xff\xfe\x00"),
    "endless nesting": Reply(200, b"[" * 200_000),
    "a reset": Reply(raw=reset),
    "no answer at all": Reply(raw=lambda _: None),
    "a body cut short": Reply(raw=cut_short),
    "a chunk cut short": Reply(raw=cut_chunk),
    "not HTTP": Reply(raw=lambda handler: handler.wfile.write(b"SSH-2.0-OpenSSH\r\n")),
}


@pytest.mark.parametrize("failure", TRANSIENT.values(), ids=TRANSIENT.keys())
def test_transient_failures_are_retried(failure):
    with serving(after(2, failure)) as server:
        answer = client_of(server, retries=2, clock=FakeTime()).post("completions", {"n": 1})
        assert answer == {"good": {"n": 1}}
        assert [asked.path for asked in server.asked] == ["/v1/completions"] * 3


@pytest.mark.parametrize("name", [name for name in TRANSIENT if not name.startswith("429")])
def test_attempts_are_bounded_and_the_last_failure_is_reported_in_one_line(name):
    with serving(after(99, TRANSIENT[name])) as server:
        with pytest.raises(RequestUnanswered, match=r"\(3 attempts\)$") as caught:
            client_of(server, retries=2, clock=FakeTime()).post("completions", {})
        assert len(server.asked) == 3
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


def test_backoff_doubles_up_to_its_limit():
    clock = FakeTime()
    with serving(after(99, TRANSIENT["500"])) as server, pytest.raises(RequestUnanswered):
        client_of(server, retries=9, clock=clock).post("completions", {})
    bounds = [min(30.0, 0.5 * 2**number) for number in range(9)]
    assert len(clock.slept) == 9
    for slept, bound in zip(clock.slept, bounds, strict=True):
        assert bound / 2 <= slept <= bound


@pytest.mark.parametrize("retry_after", [lambda: "70", lambda: formatdate(time.time() + 70, usegmt=True)])
def test_the_client_waits_as_long_as_the_server_asks(retry_after):
    clock = FakeTime()

    def script(_, number):
        return json_reply({}) if number else json_reply({}, 429, Retry_After=retry_after())

    with serving(script) as server:
        client_of(server, clock=clock).post("completions", {})
    assert sum(clock.slept) == pytest.approx(70, abs=10)


def test_throttling_costs_no_retries_but_is_bounded():
    with serving(after(20, TRANSIENT["429"])) as server:
        assert client_of(server, retries=0, clock=FakeTime()).post("completions", {})
    with serving(after(10_000, TRANSIENT["429 with Retry-After"])) as server:
        with pytest.raises(RequestUnanswered, match="slow down"):
            client_of(server, retries=0, clock=FakeTime()).post("completions", {})
        assert len(server.asked) == MAX_THROTTLED + 1


def test_a_requested_wait_of_a_day_ends_the_run():
    with (
        serving(after(1, json_reply({}, 429, Retry_After="86400"))) as server,
        pytest.raises(ServerUnusable, match=r"asks to wait 86,400 s: start the run again"),
    ):
        client_of(server).post("completions", {})


@pytest.mark.parametrize("status", [400, 403, 413, 422])
def test_a_request_that_is_refused_is_not_repeated(status):
    with serving(after(99, json_reply({"error": {"message": "context\nlength"}}, status))) as server:
        with pytest.raises(RequestRefused, match=f"^HTTP {status}: context length$"):
            client_of(server).post("completions", {})
        assert len(server.asked) == 1


@pytest.mark.parametrize("status", [401, 404])
def test_wrong_keys_models_and_addresses_end_the_run_at_once(status):
    with serving(after(99, json_reply({"message": "no such model"}, status))) as server:
        with pytest.raises(ServerUnusable, match=f"/v1: HTTP {status}: no such model"):
            client_of(server).post("completions", {})
        assert len(server.asked) == 1


def test_redirects_do_not_carry_the_key_away(monkeypatch):
    monkeypatch.setenv("SECRET", KEY)
    with serving(after(0, Reply())) as elsewhere:
        moved = Reply(302, headers={"Location": f"{elsewhere.url}/completions"})
        with serving(after(99, moved)) as server, pytest.raises(ServerUnusable, match="HTTP 302"):
            client_of(server, key_variable="SECRET").post("completions", {})
        assert elsewhere.asked == []


def test_the_key_is_sent_and_masked_in_messages(monkeypatch):
    monkeypatch.setenv("SECRET", KEY + "\n")
    with serving(lambda asked, _: json_reply({"message": f"bad: {asked.headers['authorization']}"}, 400)) as server:
        with pytest.raises(RequestRefused, match=r"bad: Bearer \*\*\*") as caught:
            client_of(server, key_variable="SECRET").post("completions", {})
        assert server.asked[0].headers["authorization"] == f"Bearer {KEY}"
    assert KEY not in str(caught.value)


def strict(answer):
    """A reader that repeats what it was given."""
    raise ValueError(f"expected nothing, got {answer!r}")


ECHOES = {
    "no JSON": lambda key: Reply(200, f"<html>echo Bearer {key}</html>".encode()),
    "no JSON, with escapes": lambda key: Reply(200, f"echo {json.dumps(key)}".encode()),
    "JSON of another shape": lambda key: json_reply({"echo": key}),
    "a message cut in the key": lambda key: json_reply({"error": {"message": "x" * 285 + f"Bearer {key}"}}, 400),
    "a page cut in the key": lambda key: Reply(400, b"x" * 285 + f"Bearer {key}".encode()),
    "a transient failure": lambda key: Reply(500, b"x" * 280 + f"Bearer {key}".encode()),
    "a wrong key": lambda key: json_reply({"error": f"wrong key {key}"}, 401),
    "a reason": lambda key: Reply(raw=lambda handler: handler.wfile.write(f"HTTP/1.1 400 {key}\r\n\r\n".encode())),
    "no HTTP": lambda key: Reply(raw=lambda handler: handler.wfile.write(f"{key}\r\n".encode())),
}


@pytest.mark.parametrize("key", [KEY, r"sk-'odd\key\"-5678"])
@pytest.mark.parametrize("name", ECHOES)
def test_no_part_of_the_key_is_in_a_message_even_if_the_server_repeats_it(monkeypatch, name, key):
    monkeypatch.setenv("SECRET", key)
    with serving(lambda *_: ECHOES[name](key)) as server, pytest.raises(ServerError) as caught:
        client_of(server, key_variable="SECRET", retries=0).post("completions", {}, strict)
    message = str(caught.value)
    assert "sk-" not in message
    assert key[-5:] not in message
    assert "*" in message or len(message) > server_client.MAX_MESSAGE_CHARACTERS  # masked, or beyond the cut
    assert len(message) < 500
    assert "\n" not in message


@pytest.mark.parametrize(
    ("value", "message"), [("", "SECRET, which should hold"), (f"{KEY}\r\nX: 1", "is not a valid key")]
)
def test_invalid_keys_are_named_only_by_their_variable(monkeypatch, value, message):
    monkeypatch.setenv("SECRET", value)
    with pytest.raises(ServerUnusable, match=message) as caught:
        ServerClient(ServerAccess("http://127.0.0.1:9/v1", "SECRET", 1.0, 0))
    assert KEY not in str(caught.value)


def test_a_server_that_does_not_respond_times_out():
    started = time.monotonic()
    with serving(after(99, Reply(raw=lambda _: time.sleep(1.0)))) as server:
        with pytest.raises(RequestUnanswered, match="timed out"):
            client_of(server, retries=1, timeout_s=0.15).post("completions", {})
        assert len(server.asked) == 2
    assert time.monotonic() - started < 1.0


def test_a_server_that_drips_bytes_times_out():
    def drip(handler):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
        for _ in range(100):
            handler.wfile.write(b" ")
            time.sleep(0.05)

    started = time.monotonic()
    with (
        serving(after(99, Reply(raw=drip))) as server,
        pytest.raises(RequestUnanswered, match=r"no complete response within 0\.2 s"),
    ):
        client_of(server, retries=0, timeout_s=0.2).post("completions", {})
    assert time.monotonic() - started < 2.0


def test_an_endless_response_is_not_read_to_its_end(monkeypatch):
    monkeypatch.setattr(server_client, "MAX_BODY_BYTES", 1 << 20)
    sent = []

    def flood(handler):
        handler.wfile.write(b"HTTP/1.1 200 OK\r\n\r\n")
        for _ in range(1_000):
            handler.wfile.write(b" " * (1 << 20))
            sent.append(1)

    with (
        serving(after(99, Reply(raw=flood))) as server,
        pytest.raises(RequestUnanswered, match="longer than 1,048,576"),
    ):
        client_of(server, retries=0).post("completions", {})
    assert len(sent) < 100


def test_an_unreachable_server_is_named_by_its_address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        access = ServerAccess(f"http://127.0.0.1:{free.getsockname()[1]}/v1", None, 1.0, 0)
        with pytest.raises(RequestUnanswered, match=r"http://127\.0\.0\.1:\d+/v1/completions: .*refused"):
            ServerClient(access).post("completions", {})


def test_a_malformed_response_counts_as_a_transient_failure():
    with serving(after(1, json_reply({"choices": []}))) as server:
        client = client_of(server, retries=1)
        assert client.post("completions", {}, lambda answer: answer["good"]) == {}
        assert len(server.asked) == 2


def test_the_rate_limit_holds_over_many_threads_with_a_burst_of_one_second():
    times = []
    limiter = RateLimiter(per_minute=1_200, clock=time.monotonic, sleep=time.sleep)

    def go(_):
        limiter.wait()
        times.append(time.monotonic())

    started = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(go, range(20)))
    assert 19 / 20 - 0.01 <= max(times) - started < 3.0
    clock = FakeTime()
    limiter = RateLimiter(per_minute=60, clock=clock.clock, sleep=clock.sleep)
    clock.now += 1_000.0  # a long rest is worth one second's requests, not sixteen minutes'
    for _ in range(12):
        limiter.wait()
    assert clock.now - 2_000.0 == pytest.approx(10.0)
