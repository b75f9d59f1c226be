"""``fedveil deploy init``: the folder a deployment is started from."""

import json
import shlex
import sys
from dataclasses import asdict, dataclass
from ipaddress import ip_address
from pathlib import Path

from fedveil.deployment.keys import Authority, node_key, signing_key
from fedveil.deployment.policy import POLICY, Policy
from fedveil.deployment.signed_apps import key_id, sign_app
from fedveil.errors import FedveilError
from fedveil.federation.engines.deployed import ENVIRONMENT, write_app
from fedveil.files import check_directory, write_atomically
from fedveil.runs.config import is_loopback
from fedveil.wording import quantity

_SECRET = 0o600
_SCRIPT = 0o755
_NODE_HOME = "/etc/fedveil-node"
_NODE_PROGRAMS = "/opt/fedveil/bin"
CONNECTION = "fedveil"


@dataclass(frozen=True)
class Deployment:
    """Where the parts of a deployment listen; ``deployment.json``.

    Attributes:
        host: Name or address the nodes reach the server under.
        port: The gate's port, open to the nodes. The SuperLink's and the shelf's are the next two,
            on loopback.
        nodes: How many nodes there are.
    """

    host: str
    port: int
    nodes: int

    @classmethod
    def open(cls, path: Path) -> "Deployment":
        """Read ``deployment.json`` of a folder ``fedveil deploy init`` made.

        Raises:
            FedveilError: It is none.
        """
        try:
            return cls(**json.loads((path / "deployment.json").read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError) as error:
            raise FedveilError(
                f"{path} is no deployment ({error}); make one with fedveil deploy init {path} "
                "--nodes N"
            ) from None

    @property
    def superlink(self) -> str:
        """The SuperLink's address, on loopback."""
        return f"127.0.0.1:{self.port + 1}"

    @property
    def shelf_port(self) -> int:
        """The shelf's port, on loopback."""
        return self.port + 2

    @property
    def gate(self) -> str:
        """The address nodes connect to."""
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"

    @property
    def listen(self) -> str:
        """The address the gate listens on."""
        if is_loopback(self.host):
            return "127.0.0.1"
        try:
            return "::" if ip_address(self.host).version == 6 else "0.0.0.0"
        except ValueError:
            return "0.0.0.0"

    def node_names(self) -> list[str]:
        """Return the names of the nodes, also of their folders."""
        return [f"node-{number}" for number in range(self.nodes)]


def create(path: Path, deployment: Deployment, *, policy: Path | None = None) -> None:
    """Write certificates, keys, start scripts, systemd units and the README of a deployment.

    Args:
        path: New or empty folder.
        deployment: What to write.
        policy: What the sites let be done with their images, a TOML file that each node gets as
            its own; without one a node runs whatever is signed.

    Raises:
        FedveilError: The folder holds something or cannot be written, or the policy says what none
            can.
    """
    check_directory(path, new=True)
    if policy is not None:
        Policy.read(policy)
    home = path.resolve()
    try:
        for part in ("flwr", "systemd", "state", "runs"):
            (home / part).mkdir(parents=True, mode=0o700)
        home.chmod(0o700)
        _write_server(home, deployment)
        _write_nodes(home, deployment, policy)
        write_app(home / "app")
        app = sign_app(home / "app", key=home / "signing.key", shelf=home / "signed-apps")
        _write(home / "README.md", _readme(home, deployment, app.spec))
        _write(home / "deployment.json", json.dumps(asdict(deployment), indent=2) + "\n")
    except OSError as error:
        raise FedveilError(f"{error.filename or path}: {error.strerror}") from None


def _write_server(home: Path, deployment: Deployment) -> None:
    authority = Authority.generate()
    server, signer = authority.server(deployment.host), signing_key()
    _write(home / "ca.key", authority.pair.private, mode=_SECRET)
    _write(home / "ca.crt", authority.pair.public)
    _write(home / "server.key", server.private, mode=_SECRET)
    _write(home / "server.crt", server.public)
    _write(home / "signing.key", signer.private, mode=_SECRET)
    _write(home / "signing.pub", signer.public)
    _write(
        home / "flwr" / "config.toml",
        f'[superlink]\ndefault = "{CONNECTION}"\n\n[superlink.{CONNECTION}]\n'
        f'address = "{deployment.superlink}"\n'
        f"root-certificates = {json.dumps(str(home / 'ca.crt'))}\n",
    )
    programs = Path(sys.executable).parent
    commands = {
        "superlink": (
            "exec flower-superlink --host 127.0.0.1 "
            f"--port {deployment.superlink.rpartition(':')[2]} \\\n"
            "    --ssl-ca-certfile ca.crt --ssl-certfile server.crt --ssl-keyfile server.key \\\n"
            "    --enable-supernode-auth --database state/superlink.db \\\n"
            "    --disable-runtime-dependency-installation"
        ),
        "gate": "exec fedveil deploy gate .",
        "shelf": "exec fedveil deploy shelf .",
    }
    for name, command in commands.items():
        _write(home / f"start-{name}", _script(programs, deployment, command), mode=_SCRIPT)
        unit = _unit(f"fedveil {name}", home, f"start-{name}")
        _write(home / "systemd" / f"fedveil-{name}.service", unit)


def _write_nodes(home: Path, deployment: Deployment, policy: Path | None) -> None:
    public = (home / "signing.pub").read_bytes()
    trusted = f"{key_id(public)}: '{public.decode().strip()}'\n"
    for number, name in enumerate(deployment.node_names()):
        folder = home / "nodes" / name
        folder.mkdir(parents=True, mode=0o700)
        key = node_key()
        _write(folder / "node.key", key.private, mode=_SECRET)
        _write(folder / "node.pub", key.public)
        _write(folder / "ca.crt", (home / "ca.crt").read_bytes())
        _write(folder / "trusted.yaml", trusted)
        images = "${FEDVEIL_NODE_IMAGES:-$PWD/images}"
        asked = _NOT_ASKED
        if policy is not None:
            _write_policy(folder, policy)
            asked, images = _ASKED_FIRST.format(images=images), "$images"
        command = (
            f"{asked}exec flower-supernode --superlink {deployment.gate} "
            "--root-certificates ca.crt \\\n"
            "    --auth-supernode-private-key node.key --trusted-entities trusted.yaml \\\n"
            f"    --host 127.0.0.1 --port {deployment.port + 10 + number} \\\n"
            f'    --node-config "partition-id={number} num-partitions={deployment.nodes} '
            f"data='{images}'\""
        )
        script = _script(Path(_NODE_PROGRAMS), deployment, command)
        _write(folder / "start", script, mode=_SCRIPT)
        unit = _unit(f"fedveil {name}", Path(_NODE_HOME), "start")
        _write(folder / "fedveil-node.service", unit)


# A policy that nothing reads would protect nobody.
_NOT_ASKED = (
    f"if [ -e {POLICY} ]; then\n"
    f"    echo '{POLICY} is not read here: this folder was made without --policy; make the "
    "deployment with fedveil deploy init --policy, or remove the file' >&2\n"
    "    exit 1\nfi\n"
)
# The folder's own flwr-clientapp must be the first that SuperExec finds.
_ASKED_FIRST = (
    'export FEDVEIL_NODE="$PWD"\n'
    'export PATH="$PWD/bin:$PATH"\n'
    'images="$(fedveil deploy images . "{images}")" || exit 1\n'
)


def _write_policy(folder: Path, policy: Path) -> None:
    (folder / "bin").mkdir(mode=0o700)
    _write(folder / POLICY, policy.read_bytes())
    program = '#!/bin/sh\nexec python -m fedveil.deployment.clientapp "$@"\n'
    _write(folder / "bin" / "flwr-clientapp", program, mode=_SCRIPT)


def _script(programs: Path, deployment: Deployment, command: str) -> str:
    settings = {
        **ENVIRONMENT,
        "OMP_NUM_THREADS": "1",
        "OMP_WAIT_POLICY": "PASSIVE",
        # Where the SuperLink asks for signed apps; a proxy must not come in between.
        "FLWR_SUPERGRID_API_URL": f"http://127.0.0.1:{deployment.shelf_port}/v1",
        "NO_PROXY": "127.0.0.1",
    }
    exports = "".join(f"export {name}={shlex.quote(value)}\n" for name, value in settings.items())
    return (
        "#!/bin/sh\n"
        'cd "$(dirname "$0")" || exit 1\n'
        'export FLWR_HOME="$PWD/flwr"\n'
        f'export PATH={shlex.quote(str(programs))}:"$PATH"\n'
        f"{exports}{command}\n"
    )


def _unit(title: str, home: Path, script: str) -> str:
    return (
        f"[Unit]\nDescription={title}\nWants=network-online.target\nAfter=network-online.target\n\n"
        f"[Service]\nUser=fedveil\nWorkingDirectory={home}\nExecStart={home / script}\n"
        "Restart=on-failure\nRestartSec=5\nKillMode=control-group\nNoNewPrivileges=yes\n"
        "PrivateTmp=yes\nProtectSystem=full\nUMask=0077\n\n"
        "[Install]\nWantedBy=multi-user.target\n"
    )


_README = """# A fedveil federation of {nodes}

Server: {host}, port {port}. Written by `fedveil deploy init`.

## On the server

Start the three parts, each in a terminal of its own or by its unit in `systemd/`:

```sh
{here}/start-shelf
{here}/start-superlink
{here}/start-gate
```

Make the nodes known, once:

```sh
fedveil deploy register {here}
```

Only port {port}, the gate's, may be open to other machines. {superlink} (the
SuperLink) and 127.0.0.1:{shelf_port} (the shelf of signed apps) are on loopback. Keep
them there: the SuperLink asks nobody who reaches it directly for a password.

## On each node

Copy `nodes/node-N`, and nothing else of this folder, to the node as `{node_home}`; install fedveil
into `{node_programs}`; say where its images are, a sub-folder a class:

```sh
FEDVEIL_NODE_IMAGES=/srv/images {node_home}/start
```

Then delete `nodes/node-N/node.key` here: nobody but the node needs it.

## Train

On the server, with a dataset whose test images calibrate the noise:

```sh
{train}
```

or with Flower's own command, in a run directory that `fedveil train` made before:

```sh
{flwr} run {app} {connection} --run-config 'out="{run}"'
```

What runs, and which nodes are there:

```sh
fedveil deploy status {here}
```

## Your own app

```sh
fedveil deploy sign {here} /path/to/app
{flwr} run @publisher/name==1.0.0 {connection}
```

Nodes refuse every app that `signing.key` has not signed. Keep `signing.key` and `ca.key` on another
machine; the server needs neither to run.
"""


def _readme(home: Path, deployment: Deployment, app: str) -> str:
    run = home / "runs" / "first"
    train = (
        f"fedveil train --engine deployed --superlink {deployment.superlink} \\\n"
        f"    --root-certificates {shlex.quote(str(home / 'ca.crt'))} --app {app} \\\n"
        f"    --clients {deployment.nodes} --fraction 1 --dataset digits \\\n"
        f"    --strategy noise-delta --cap 0.6 --rounds 20 --out {shlex.quote(str(run))}"
    )
    return _README.format(
        app=app,
        connection=CONNECTION,
        flwr=f"FLWR_HOME={shlex.quote(str(home / 'flwr'))} flwr",
        here=shlex.quote(str(home)),
        host=deployment.host,
        node_home=_NODE_HOME,
        node_programs=Path(_NODE_PROGRAMS).parent,
        nodes=quantity(deployment.nodes, "node"),
        port=deployment.port,
        run=run,
        shelf_port=deployment.shelf_port,
        superlink=deployment.superlink,
        train=train,
    )


def _write(path: Path, content: str | bytes, *, mode: int = 0o644) -> None:
    write_atomically(path, content.encode() if isinstance(content, str) else content, mode=mode)
