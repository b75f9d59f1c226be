"""What a node's images pass through before any app sees them."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

from fedveil.data.cache import digest
from fedveil.defenses import transform_folder
from fedveil.defenses.specs import parse_defense
from fedveil.deployment.policy import POLICY, Policy
from fedveil.errors import FedveilError
from fedveil.files import write_atomically
from fedveil.wording import quantity

_COPY = "state/images"
_MADE_OF = "state/images.json"


def admitted_images(node: Path, source: Path, *, tell: Callable[[str], None]) -> Path:
    """Return the folder that apps find a node's images in.

    Where the policy names a transformation that is a transformed copy in the node's own folder,
    made anew when an image, the policy's transformation or this function's way has changed since.

    Args:
        node: The node's folder, with its policy.
        source: The site's images.
        tell: Told in a sentence each what is in the copy and which files are not.

    Returns:
        ``source``, absolute, or the copy.

    Raises:
        FedveilError: The policy cannot be read, ``source`` holds no images, or a file is no
            readable image.
    """
    policy = Policy.read(node / POLICY)
    if not source.exists():
        raise FedveilError(f"{source}: no such folder; name the images in FEDVEIL_NODE_IMAGES")
    if policy.transform is None:
        return source.resolve()
    copy, note = (node / _COPY).resolve(), node / _MADE_OF
    made_of = _fingerprint(source, policy.transform)
    if copy.is_dir() and note.is_file() and json.loads(note.read_text()) == made_of:
        return copy
    transform = parse_defense(policy.transform).transform
    assert transform is not None, "a policy's transformation is one"
    note.unlink(missing_ok=True)
    shutil.rmtree(copy, ignore_errors=True)
    count = transform_folder(source, copy, transform, tell=lambda line: tell(f"{source}: {line}"))
    write_atomically(note, json.dumps(made_of).encode())
    tell(f"{source}: {copy} has {quantity(count, 'image')}, transformed by {policy.transform}")
    return copy


def _fingerprint(source: Path, transform: str) -> str:
    files = sorted(path for path in source.rglob("*") if path.is_file())
    states = [(str(path), path.stat().st_size, path.stat().st_mtime_ns) for path in files]
    return digest(str(source.resolve()), transform, states)
