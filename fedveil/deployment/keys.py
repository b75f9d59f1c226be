"""Certificates and keys of a deployment, in the forms Flower 1.41 reads."""

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from ipaddress import ip_address

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

_CURVE = ec.SECP384R1()
_CA_DAYS = 3_650
_SERVER_DAYS = 825
_CLOCKS_APART = timedelta(hours=1)


@dataclass(frozen=True)
class KeyPair:
    """A private key and what may be shown of it, both PEM or OpenSSH text.

    Attributes:
        private: The private key, unencrypted.
        public: A certificate, or a public key.
    """

    private: bytes
    public: bytes


@dataclass(frozen=True)
class Authority:
    """A certificate authority of one deployment.

    Attributes:
        key: Its private key.
        certificate: Its self-signed certificate.
    """

    key: ec.EllipticCurvePrivateKey
    certificate: x509.Certificate

    @classmethod
    def generate(cls) -> "Authority":
        """Make one, valid for ten years."""
        key = ec.generate_private_key(_CURVE)
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedveil deployment CA")])
        usage = x509.KeyUsage(
            digital_signature=True,
            key_cert_sign=True,
            crl_sign=True,
            content_commitment=False,
            key_encipherment=False,
            data_encipherment=False,
            key_agreement=False,
            encipher_only=False,
            decipher_only=False,
        )
        certificate = (
            _builder(name, name, key.public_key(), _CA_DAYS)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(usage, critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), False)
            .sign(key, hashes.SHA384())
        )
        return cls(key, certificate)

    @property
    def pair(self) -> KeyPair:
        """The authority in PEM."""
        return KeyPair(_pem(self.key), self.certificate.public_bytes(Encoding.PEM))

    def server(self, host: str) -> KeyPair:
        """Return key and certificate of a server that is reached as ``host`` and on loopback.

        Args:
            host: DNS name or IP address.
        """
        key = ec.generate_private_key(_CURVE)
        name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, host)])
        names = [_general_name(n) for n in dict.fromkeys([host, "localhost", "127.0.0.1", "::1"])]
        issuer = self.certificate.subject
        certificate = (
            _builder(name, issuer, key.public_key(), _SERVER_DAYS)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(x509.ExtendedKeyUsage([ExtendedKeyUsageOID.SERVER_AUTH]), False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self.key.public_key()), False
            )
            .sign(self.key, hashes.SHA384())
        )
        return KeyPair(_pem(key), certificate.public_bytes(Encoding.PEM))


def node_key() -> KeyPair:
    """Return the key a SuperNode signs its requests with: EC P-384, OpenSSH."""
    return _openssh(ec.generate_private_key(_CURVE))


def signing_key() -> KeyPair:
    """Return the key apps are signed with: Ed25519, OpenSSH."""
    return _openssh(ed25519.Ed25519PrivateKey.generate())


def _builder(
    subject: x509.Name, issuer: x509.Name, key: ec.EllipticCurvePublicKey, days: int
) -> x509.CertificateBuilder:
    now = datetime.now(UTC)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _CLOCKS_APART)
        .not_valid_after(now + timedelta(days=days))
    )


def _general_name(name: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(name))
    except ValueError:
        return x509.DNSName(name)


def _pem(key: ec.EllipticCurvePrivateKey) -> bytes:
    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _openssh(key: ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey) -> KeyPair:
    public = key.public_key().public_bytes(Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    return KeyPair(
        key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()), public + b"\n"
    )
