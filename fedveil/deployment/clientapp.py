"""``flwr-clientapp`` of a node with a policy: asks the site before an app's code is loaded.

Flower's SuperExec starts ``flwr-clientapp`` for every message, the first on its PATH; a node's
folder holds one that runs this. The process is Flower's own but for one question between the two
steps "the message is there" and "the app is installed". What is refused goes back as Flower's error
of that message, and no line of the app has run.
"""

import math
import os
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any

from flwr.app import Context, Message
from flwr.supernode.cli import flwr_clientapp
from flwr.supernode.runtime import run_clientapp as runtime

from fedveil.deployment.ledger import Ledger, Release
from fedveil.deployment.policy import POLICY, Policy, PolicyError, private_task
from fedveil.errors import FedveilError

NODE = "FEDVEIL_NODE"
"""Environment variable: a node's folder, with its policy and its ledger."""

LEDGER = "state/ledger.jsonl"
"""The ledger's place in a node's folder."""

_ASKED_BETWEEN = ("pull_task_input", "install_from_fab")


def admit(node: Path, app: str, message: Message, context: Context, *, bundle: str) -> None:
    """Let a message be answered, and note what it spends; or refuse it.

    Args:
        node: The node's folder.
        app: ``@publisher/name==version`` of the app that is to run.
        message: What it is to answer.
        context: The node's.
        bundle: SHA-256 of the app's bundle, hex.

    Raises:
        PolicyError: The site's policy forbids it.
        FedveilError: The policy or the ledger cannot be read, or the node's images.
    """
    policy = Policy.read(node / POLICY)
    policy.check(app, message, bundle=bundle)
    if policy.epsilon is not None and policy.releases(message):
        release = _release(message, context)
        Ledger(node / LEDGER).spend(release, most=policy.epsilon, delta=policy.delta)


def _release(message: Message, context: Context) -> Release:
    from fedveil.defenses.specs import parse_defense
    from fedveil.federation.client_app import client_images

    task = private_task(message)
    privacy = parse_defense(task.defense).privacy
    if privacy is None:
        raise PolicyError("the task has no DP-SGD")
    images = len(client_images(context, task))
    return Release(
        run=context.run_id,
        message=message.metadata.message_id,
        noise=privacy.noise,
        rate=min(1.0, task.batch_size / images),
        steps=task.epochs * math.ceil(images / task.batch_size),
    )


def main() -> None:
    """Run ``flwr-clientapp`` under the policy of the node whose folder the environment names.

    Raises:
        FedveilError: The environment names none, or this Flower has no place to ask at.
    """
    folder = os.environ.get(NODE)
    if not folder:
        raise FedveilError(f"{NODE} is not set; start the node by its folder's start script")
    missing = [name for name in _ASKED_BETWEEN if not hasattr(runtime, name)]
    if missing:
        raise FedveilError(
            f"this Flower has no {' and '.join(missing)}, so no policy can be enforced before an "
            "app is loaded; install the version that fedveil's constraints name"
        )
    _ask_between(Path(folder))
    sys.argv[0] = "flwr-clientapp"
    flwr_clientapp()


def _ask_between(node: Path) -> None:
    pull, install = (getattr(runtime, name) for name in _ASKED_BETWEEN)
    pulled: list[Any] = []

    def pull_and_keep(client: Any) -> Any:
        pulled[:] = pull(client)
        return tuple(pulled)

    def install_if_admitted(content: Any, **options: Any) -> Any:
        message, context, run, fab = pulled
        # Of what is about to be installed, not of what Flower says of it.
        bundle = sha256(fab.content).hexdigest()
        admit(node, f"@{run.fab_id}=={run.fab_version}", message, context, bundle=bundle)
        return install(content, **options)

    for name, asking in zip(_ASKED_BETWEEN, (pull_and_keep, install_if_admitted), strict=True):
        setattr(runtime, name, asking)


if __name__ == "__main__":
    main()
