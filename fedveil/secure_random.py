"""Random numbers that protect somebody: a cryptographic stream under 256 fresh bits.

``torch.Generator`` on a CPU seeds itself with 32 bits, which are tried in minutes; whoever finds
them subtracts the noise. Nothing whose secrecy matters is drawn from one.
"""

import math
import secrets
from collections.abc import Sequence

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher
from cryptography.hazmat.primitives.ciphers.algorithms import ChaCha20
from torch import Tensor

from fedveil.errors import FedveilError

_KEY_BYTES = 32
_BLOCK = 2**20  # values made at once, to bound what the stream holds


class SecureGenerator:
    """Uniform and normal values expanded from a key by ChaCha20 (RFC 8439).

    Values go on where the last call stopped. Normal values are made in float64 by the inverse of
    the normal distribution, from 53 bits each, so that |z| reaches 8.2 as a normal value's would.
    Nothing is promised against whoever reads the lowest bits of a sum of floats (Mironov, "On
    Significance of the Least Significant Bits for Differential Privacy", CCS 2012).

    Args:
        key: 32 bytes; None for fresh ones of the operating system.

    Raises:
        FedveilError: A key of another length.
    """

    def __init__(self, key: bytes | None = None) -> None:
        key = secrets.token_bytes(_KEY_BYTES) if key is None else key
        if len(key) != _KEY_BYTES:
            raise FedveilError(
                f"a secure generator's key has {_KEY_BYTES} bytes, this one {len(key)}; leave it "
                "out to have a fresh one drawn"
            )
        self._stream = Cipher(ChaCha20(key, bytes(16)), mode=None).encryptor()

    def uniform(self, *shape: int) -> Tensor:
        """Return values in [0, 1), multiples of 2⁻⁵³, float64 of the shape."""
        return self._units(shape, 0.0)

    def normal(self, *shape: int) -> Tensor:
        """Return independent standard normal values, float64 of the shape."""
        # Half a step up: the inverse is infinite at 0.
        values: Tensor = torch.special.ndtri(self._units(shape, 2.0**-54))
        return values

    def _units(self, shape: Sequence[int], shift: float) -> Tensor:
        count = math.prod(shape)
        found = torch.empty(count, dtype=torch.float64)
        for start in range(0, count, _BLOCK):
            size = min(_BLOCK, count - start)
            words = np.frombuffer(self._stream.update(bytes(8 * size)), dtype="<u8")
            found[start : start + size] = torch.from_numpy((words >> 11) * 2.0**-53 + shift)
        return found.reshape(tuple(shape))
