"""What a node's own config lets a server ask it for."""

from flwr.app import Context

from fedveil.errors import FedveilError

MODELS = "models"
"""Key of a node config: the models this node trains, separated by commas; no others."""


def check_model_allowed(name: str, context: Context) -> None:
    """Refuse a model that the node's config does not name; a config without the key names all.

    To be asked before the model is built: its name may be that of a module to import.

    Raises:
        FedveilError: Names both.
    """
    allowed = context.node_config.get(MODELS)
    if allowed is not None and name not in [known.strip() for known in str(allowed).split(",")]:
        raise FedveilError(
            f"this node's config allows {MODELS} {allowed}, and the server asked for "
            f"{name!r}; ask the site to allow it, or train another"
        )
