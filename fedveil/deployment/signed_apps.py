"""Signed apps, and the shelf a SuperLink takes them from without the internet.

A SuperNode with ``--trusted-entities`` runs only apps that carry a signature by a key it names.
Flower 1.41 attaches signatures to nothing but apps it fetches from Flower Hub, whose address is the
SuperLink's ``FLWR_SUPERGRID_API_URL``; so the shelf answers the one request the SuperLink makes of
the Hub, on loopback. The nodes check the signature themselves and need not trust the shelf.
"""

import base64
import hashlib
import json
import subprocess
import tempfile
import time
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric import ed25519
from cryptography.hazmat.primitives.serialization import load_ssh_private_key

from fedveil.errors import FedveilError
from fedveil.federation.engines.deployed import environment, program
from fedveil.files import write_atomically

_LARGEST_REQUEST = 64 * 1024


@dataclass(frozen=True)
class SignedApp:
    """An app on the shelf.

    Attributes:
        name: ``publisher/app``.
        version: Three numbers.
        bundle: Its FAB file.
    """

    name: str
    version: str
    bundle: Path

    @property
    def spec(self) -> str:
        """What ``flwr run`` and ``fedveil train --app`` call it."""
        return f"@{self.name}=={self.version}"


def key_id(public_key: bytes) -> str:
    """Return the name of a signing key in a node's file of trusted entities."""
    return "fpk_" + hashlib.sha256(public_key.split()[1]).hexdigest()[:32]


def sign_app(app: Path, *, key: Path, shelf: Path) -> SignedApp:
    """Bundle an app folder with ``flwr build``, sign the bundle, and put both on the shelf.

    Args:
        app: Folder with a ``pyproject.toml`` of a Flower app.
        key: OpenSSH Ed25519 private key; its public half lies beside it as ``.pub``.
        shelf: Folder of signed apps.

    Raises:
        FedveilError: The app cannot be bundled or the key is none.
    """
    private = _load(key)
    public = key.with_suffix(".pub").read_bytes()
    with tempfile.TemporaryDirectory(prefix="fedveil-") as name:
        work = Path(name)
        done = subprocess.run(
            [program("flwr"), "build", "--app", str(app.resolve())],
            cwd=work,
            env=environment(work / "flwr"),
            capture_output=True,
            text=True,
            check=False,
        )
        built = sorted(work.glob("*.fab"))
        if not built:
            raise FedveilError(f"{app} could not be bundled: {(done.stdout + done.stderr).strip()}")
        content = built[0].read_bytes()
    config = tomllib.loads((app / "pyproject.toml").read_text(encoding="utf-8"))
    publisher = config["tool"]["flwr"]["app"]["publisher"]
    project, version = config["project"]["name"], config["project"]["version"]
    signed = SignedApp(
        f"{publisher}/{project}", version, shelf / publisher / project / f"{version}.fab"
    )
    signed.bundle.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(signed.bundle, content)
    signature = json.dumps(_sign(content, private, key_id(public)), indent=2) + "\n"
    write_atomically(signed.bundle.with_suffix(".json"), signature.encode())
    return signed


def _load(path: Path) -> ed25519.Ed25519PrivateKey:
    try:
        key = load_ssh_private_key(path.read_bytes(), None)
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise FedveilError(f"the signing key {path} cannot be read: {error}") from None
    if not isinstance(key, ed25519.Ed25519PrivateKey):
        raise FedveilError(f"{path} is no Ed25519 key; make one with fedveil deploy init")
    return key


def _sign(content: bytes, key: ed25519.Ed25519PrivateKey, name: str) -> dict[str, Any]:
    # The time in eight bytes, then the bundle's SHA-256: what `flwr app review` signs.
    signed_at = int(time.time())
    message = signed_at.to_bytes(8, "big") + hashlib.sha256(content).digest()
    signature = base64.urlsafe_b64encode(key.sign(message)).rstrip(b"=").decode()
    return {"public_key_id": name, "signature": signature, "signed_at": signed_at}


class Shelf(ThreadingHTTPServer):
    """Answers a SuperLink's question for a signed app; on loopback only.

    Args:
        folder: Folder of signed apps.
        port: Where on 127.0.0.1 to listen.
    """

    daemon_threads = True

    def __init__(self, folder: Path, port: int) -> None:
        super().__init__(("127.0.0.1", port), _Answer)
        self.folder = folder

    def find(self, app: str, version: str | None) -> SignedApp | None:
        """Return an app by its name, the newest version if none is asked for."""
        found = {
            (f"@{file.parent.parent.name}/{file.parent.name}", file.stem): file
            for file in self.folder.glob("*/*/*.fab")
        }
        versions = [v for name, v in found if name == app and version in (None, v)]
        if not versions:
            return None
        newest = max(versions, key=lambda text: [int(part) for part in text.split(".")])
        return SignedApp(app[1:], newest, found[app, newest])


class _Answer(BaseHTTPRequestHandler):
    server: Shelf

    def do_POST(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        if self.path != "/v1/hub/fetch-fab" or not 0 < length <= _LARGEST_REQUEST:
            return self._say(404, {"detail": "not here"})
        try:
            asked = json.loads(self.rfile.read(length))
            app = self.server.find(str(asked["app_id"]), asked.get("app_version"))
        except (ValueError, KeyError, TypeError):
            return self._say(400, {"detail": "not understood"})
        if app is None:
            return self._say(404, {"detail": "this app is not on the shelf"})
        place = app.bundle.relative_to(self.server.folder)
        url = f"http://127.0.0.1:{self.server.server_port}/fab/{place}"
        signature = json.loads(app.bundle.with_suffix(".json").read_text())
        return self._say(200, {"fab_url": url, "verifications": [signature]})

    def do_GET(self) -> None:
        parts = self.path.removeprefix("/fab/").removesuffix(".fab").split("/")
        app = self.server.find(f"@{parts[0]}/{parts[1]}", parts[2]) if len(parts) == 3 else None
        if app is None:
            return self._say(404, {"detail": "this app is not on the shelf"})
        content = app.bundle.read_bytes()
        self.send_response(200)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)
        return None

    def _say(self, status: int, content: Mapping[str, Any]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
