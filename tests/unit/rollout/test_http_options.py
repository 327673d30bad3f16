"""HTTP clients of rollout servers check certificates, and read those of the authorities once per process."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import ipaddress
import ssl
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from megatron_chord.rollout import http_options
from megatron_chord.rollout.client import RolloutClient
from megatron_chord.rollout.replies import GenerateRequest, RolloutError

REQUEST = GenerateRequest(
    prompt_ids=(5,), num_rollouts=1, seed=3, temperature=1.0, max_tokens=3, stop_token_ids=(2,)
)


def test_certificates_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A run makes a client for each server in each step."""
    calls: list[Any] = []
    create = ssl.create_default_context
    monkeypatch.setattr(ssl, "create_default_context", lambda *a, **k: calls.append(a) or create(*a, **k))
    http_options.certificates.cache_clear()

    async def begin_to_sample(client: RolloutClient) -> None:
        async with client._async_http():
            pass

    for port in range(1, 4):
        with contextlib.closing(RolloutClient(f"https://127.0.0.1:{port}", "key")) as client:
            for _ in range(2):
                asyncio.run(begin_to_sample(client))
    assert len(calls) == 1


def test_certificates_are_checked() -> None:
    verify = http_options.http_options("https://node", "key")["verify"]
    assert verify.verify_mode == ssl.CERT_REQUIRED
    assert verify.check_hostname


def test_a_server_with_an_unsigned_certificate_gets_no_key(tmp_path: Path) -> None:
    certificate, key = tmp_path / "certificate.pem", tmp_path / "key.pem"
    write_own_certificate(certificate, key)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    received: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            received.append(self.path)

        do_GET = do_POST

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.handle_error = lambda *_: None  # type: ignore[method-assign]  # the client's refusals
    server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        client = RolloutClient(f"https://127.0.0.1:{server.server_port}", "key", retries=0)
        with contextlib.closing(client):
            with pytest.raises(RolloutError, match="self-signed certificate"):
                client.generate([REQUEST], version=0, deadline_s=30)
            with pytest.raises(RolloutError, match="self-signed certificate"):
                client.weight_version()
    finally:
        server.shutdown()
        server.server_close()
    assert received == []


def write_own_certificate(certificate: Path, key: Path) -> None:
    """A certificate of 127.0.0.1 that no authority has signed, and its key."""
    secret = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "node")])
    now = datetime.datetime.now(datetime.UTC)
    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    signed = (
        x509.CertificateBuilder(name, name, secret.public_key(), x509.random_serial_number())
        .not_valid_before(now)
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([address]), critical=False)
        .sign(secret, hashes.SHA256())
    )
    certificate.write_bytes(signed.public_bytes(serialization.Encoding.PEM))
    key.write_bytes(
        secret.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
