"""What a node's own config lets a server ask it for."""

from flwr.app import Context

from fedveil.errors import FedveilError

MOST_EPSILON = "most-epsilon"
"""Key of a node config: the largest ε for which this node's answers may have their noise."""

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


def check_epsilon(epsilon: float | None, context: Context) -> None:
    """Refuse noise that is less than the node's config asks for; one without the key asks for none.

    Args:
        epsilon: ε of the noise that the server asks for; None where it asks for none.
        context: The node's.

    Raises:
        FedveilError: Names both.
    """
    most = context.node_config.get(MOST_EPSILON)
    if most is not None and (epsilon is None or epsilon > float(most)):
        asked = "no noise" if epsilon is None else f"noise for epsilon = {epsilon:g}"
        raise FedveilError(
            f"this node's config has {MOST_EPSILON} {most}, and the server asked for {asked}; "
            "train with a lower --epsilon"
        )
