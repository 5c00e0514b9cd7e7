"""The door: one port, this machine's names, the page's own requests, and headers that keep a
browser at home."""

import asyncio
import socket

import pytest

from owlfuse.core.errors import ConfigError
from owlfuse.serving.demo import server
from owlfuse.serving.demo.server import Guard, listen


def get(tmp_path, path="/", **headers):
    """Status, headers and body behind the guard."""
    sent = []

    async def app(scope, receive, send):
        own = [(b"content-type", b"text/html"), (b"X-Content-Type-Options", b"other")]
        await send({"type": "http.response.start", "status": 200, "headers": own})
        await send({"type": "http.response.body", "body": b"page"})

    async def send(message):
        sent.append(message)

    headers = {"host": "127.0.0.1:7860", **headers}
    scope = {
        "type": "http",
        "path": path,
        "headers": [(k.encode(), v.encode()) for k, v in headers.items()],
    }
    asyncio.run(Guard(app, tmp_path)(scope, None, send))
    names = [name.decode().lower() for name, _ in sent[0]["headers"]]
    assert len(set(names)) == len(names)
    return (
        sent[0]["status"],
        {n.decode().lower(): v.decode() for n, v in sent[0]["headers"]},
        sent[1]["body"].decode(),
    )


def test_every_answer_keeps_the_browser_from_asking_elsewhere(tmp_path):
    status, headers, body = get(tmp_path)
    assert (status, body) == (200, "page")
    assert headers["x-content-type-options"] == "nosniff"
    rules = dict(rule.split(" ", 1) for rule in headers["content-security-policy"].split("; "))
    assert rules["default-src"] == "'self'"
    for rule in rules.values():
        assert not set(rule.split()) - {
            "'self'",
            "'none'",
            "'unsafe-inline'",
            "'unsafe-eval'",
            "data:",
            "blob:",
        }


@pytest.mark.parametrize("host", ["localhost:7860", "127.0.0.1:7860", "[::1]:7860", "127.0.0.1"])
def test_this_machines_names_are_answered(tmp_path, host):
    assert get(tmp_path, host=host)[0] == 200


@pytest.mark.parametrize(
    "host", ["evil.example:7860", "evil.example", "127.0.0.1.evil.example", ""]
)
def test_another_name_for_this_machine_is_refused(tmp_path, host):
    assert get(tmp_path, host=host)[0] == 403


def test_another_web_site_may_not_ask(tmp_path):
    assert get(tmp_path, origin="http://127.0.0.1:7860")[0] == 200
    for origin in ("https://evil.example", "http://127.0.0.1:7861", "null"):
        assert get(tmp_path, origin=origin)[0] == 403


@pytest.mark.parametrize(
    "path",
    [
        "/gradio_api/file=http://example.com/a.png",
        "/gradio_api/file=HTTPS%3A//example.com/a.png",
        "/gradio_api/file/http://example.com/a.png",
        "/gradio_api/proxy=https://x.hf.space/a",
    ],
)
def test_nothing_is_fetched_from_other_servers(tmp_path, path):
    assert get(tmp_path, path)[0] == 403


def test_uploads_end_when_too_much_is_stored(tmp_path, monkeypatch):
    monkeypatch.setattr(server, "MAX_STORED", 4)
    (tmp_path / "a").write_bytes(b"1234")
    assert get(tmp_path, "/gradio_api/upload")[0] == 200
    (tmp_path / "b").write_bytes(b"5")
    assert get(tmp_path, "/gradio_api/upload")[0] == 507
    assert get(tmp_path, "/gradio_api/config")[0] == 200


def test_a_taken_port_is_told_and_without_one_the_next_is_taken(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(
            ConfigError,
            match=rf"--port {port} of 127\.0\.0\.1: Address already in use; name another, or none",
        ):
            listen(port)
        monkeypatch.setattr(server, "PORT", port)
        with listen(None) as bound:
            assert port < bound.getsockname()[1] < port + server.PORT_COUNT
        monkeypatch.setattr(server, "PORT_COUNT", 1)
        with pytest.raises(ConfigError, match="no port of 127.0.0.1 from .* is free"):
            listen(None)
    with pytest.raises(ConfigError, match="--port 99999: expected a number from 0 to 65535"):
        listen(99999)
