"""What ``fedveil deploy init`` writes, and what it refuses."""

import os
import ssl
import stat
import subprocess
from configparser import ConfigParser
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import load_ssh_private_key, load_ssh_public_key

from fedveil.deployment.layout import Deployment
from fedveil.errors import FedveilError
from fedveil.runs.config import TrainConfig
from tests.commands import forked
from tests.deployment.conftest import free_block


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("init") / "deployment"
    # Free ports, so that a deployment of this machine's own is not taken for this one.
    address = ("--host", "fl.example.org", "--port", free_block())
    done = forked("deploy", "init", home, "--nodes", 2, *address)
    assert done.returncode == 0, done.stderr
    return home


def test_private_keys_are_the_owners_alone(home):
    keys = {path for path in home.rglob("*") if b"PRIVATE KEY" in _content(path)}
    assert {path.name for path in keys} == {"ca.key", "server.key", "signing.key", "node.key"}
    assert len(keys) == 5
    assert {stat.S_IMODE(path.stat().st_mode) for path in keys} == {0o600}
    assert stat.S_IMODE(home.stat().st_mode) == 0o700


def _content(path):
    return path.read_bytes() if path.is_file() else b""


def test_keys_are_of_the_kinds_flower_reads(home):
    nodes = [home / "nodes" / name for name in ("node-0", "node-1")]
    publics = set()
    for node in nodes:
        private = load_ssh_private_key((node / "node.key").read_bytes(), None)
        public = load_ssh_public_key((node / "node.pub").read_bytes())
        assert isinstance(private, ec.EllipticCurvePrivateKey)
        assert private.public_key() == public
        publics.add((node / "node.pub").read_bytes())
    assert len(publics) == 2
    signer = load_ssh_private_key((home / "signing.key").read_bytes(), None)
    assert isinstance(signer, ed25519.Ed25519PrivateKey)


def test_openssl_accepts_the_servers_certificate_under_its_name_and_no_other(home):
    def verify(*options):
        command = ["openssl", "verify", "-CAfile", home / "ca.crt", "-x509_strict", *options]
        done = subprocess.run(
            [*map(str, command), str(home / "server.crt")],
            capture_output=True,
            text=True,
            check=False,
        )
        return done.returncode == 0

    assert verify("-purpose", "sslserver", "-verify_hostname", "fl.example.org")
    assert verify("-verify_ip", "127.0.0.1")
    assert not verify("-verify_hostname", "evil.example.org")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(home / "server.crt", home / "server.key")
    authority = x509.load_pem_x509_certificate((home / "ca.crt").read_bytes())
    assert authority.extensions.get_extension_for_class(x509.BasicConstraints).value.ca


def test_a_nodes_folder_holds_nothing_of_the_server_or_of_another_node(home):
    secrets = [home / "ca.key", home / "server.key", home / "signing.key"]
    secrets += [home / "nodes/node-1/node.key"]
    held = b"".join(_content(path) for path in (home / "nodes/node-0").rglob("*"))
    for secret in secrets:
        assert secret.read_bytes().splitlines()[3] not in held
    assert {path.name for path in (home / "nodes/node-0").iterdir()} == {
        *("ca.crt", "fedveil-node.service", "node.key", "node.pub", "start", "trusted.yaml")
    }


def test_units_start_the_scripts_and_leave_nothing_to_others(home):
    """What systemd itself makes of them is the next test's; not every machine has it."""
    units = {
        path: ConfigParser(strict=True, interpolation=None) for path in home.rglob("*.service")
    }
    assert len(units) == 5
    for path, unit in units.items():
        unit.read_string(path.read_text())
        service = unit["Service"]
        script = Path(service["ExecStart"].split()[0])
        there = path.parent if script.parent == Path("/etc/fedveil-node") else script.parent
        assert os.access(there / script.name, os.X_OK)
        assert (service["UMask"], service["User"]) == ("0077", "fedveil")
        assert unit["Install"]["WantedBy"]


def test_systemd_accepts_the_units(home, tmp_path):
    units = [*home.glob("systemd/*.service"), *home.glob("nodes/node-0/*.service")]
    assert len(units) == 4
    for unit in units:
        # A node's script is where the node will have it; here only its syntax can be checked.
        there = unit.read_text().replace("/etc/fedveil-node", str(unit.parent))
        (tmp_path / unit.name).write_text(there.replace("User=fedveil", "User=root"))
        try:
            done = subprocess.run(
                ["systemd-analyze", "verify", str(tmp_path / unit.name)],
                capture_output=True,
                text=True,
                check=False,
            )
        except FileNotFoundError:
            pytest.skip("no systemd here; the test above reads the units all the same")
        assert unit.name not in done.stderr, done.stderr


def test_shell_accepts_the_scripts(home):
    scripts = [path for path in home.rglob("start*") if path.is_file()]
    assert len(scripts) == 5
    for script in scripts:
        assert subprocess.run(["sh", "-n", script], check=False).returncode == 0


def test_an_occupied_folder_stays_as_it_is(home):
    before = (home / "ca.key").read_bytes()
    done = forked("deploy", "init", home, "--nodes", 2)
    assert done.returncode == 2
    assert "not empty" in done.stderr
    assert (home / "ca.key").read_bytes() == before


def test_status_of_a_deployment_that_does_not_run(home):
    done = forked("deploy", "status", home)
    assert done.returncode == 1
    assert done.stdout.count("DOWN") == 3
    assert done.stdout.count("not registered") == 2
    done = forked("deploy", "register", home)
    assert done.returncode == 2
    assert "start-superlink" in done.stderr


def test_a_folder_that_is_no_deployment(tmp_path):
    for command in ("status", "register", "gate", "shelf"):
        done = forked("deploy", command, tmp_path)
        assert done.returncode == 2
        assert "no deployment" in done.stderr


@pytest.mark.parametrize(
    ("host", "listens"),
    [("127.0.0.1", "127.0.0.1"), ("10.1.2.3", "0.0.0.0"), ("fd00::1", "::"), ("a.org", "0.0.0.0")],
)
def test_the_gate_listens_beyond_loopback_only_where_nodes_are_elsewhere(host, listens):
    assert Deployment(host, 9092, 1).listen == listens
    assert Deployment(host, 9092, 1).superlink == "127.0.0.1:9093"


@pytest.mark.parametrize("address", ["10.0.0.7:9092", "fl.example.org:9092", "[fd00::1]:9092"])
def test_a_superlink_elsewhere_needs_tls_unless_it_is_forced_by_name(address):
    settings = {"engine": "deployed", "superlink": address}
    with pytest.raises(FedveilError, match="in the clear"):
        TrainConfig.check(settings)
    assert TrainConfig.check(settings | {"root_certificates": "ca.crt"}).superlink == address
    forced = settings | {"send_models_unencrypted": True}
    assert TrainConfig.check(forced).superlink == address


@pytest.mark.parametrize("address", ["127.0.0.1:9092", "localhost:1", "[::1]:9092", "127.9.9.9:1"])
def test_loopback_needs_no_tls(address):
    TrainConfig.check({"engine": "deployed", "superlink": address})


def test_wrong_superlinks_are_named():
    with pytest.raises(FedveilError, match="no address"):
        TrainConfig.check({"engine": "deployed", "superlink": "localhost"})
    with pytest.raises(FedveilError, match="engine deployed"):
        TrainConfig.check({"superlink": "localhost:1"})


def test_a_policy_that_nothing_would_read_keeps_a_node_from_starting(home):
    node = home / "nodes" / "node-0"
    policy = node / "policy.toml"
    policy.write_text("epsilon = 1")
    try:
        done = subprocess.run([node / "start"], capture_output=True, text=True, check=False)
    finally:
        policy.unlink()
    assert done.returncode == 1
    assert "policy.toml is not read here" in done.stderr
