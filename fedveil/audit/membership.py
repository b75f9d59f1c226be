"""How many images behind an update a server picks out among candidates, rebuilding none."""

import torch
from torch import Tensor, nn

from fedveil.attacks.inversion import Observation
from fedveil.attacks.membership.gradients import GradientMembership
from fedveil.audit.adaptive import MEMBERSHIP, attackers
from fedveil.audit.metrics import CANDIDATES, recognised
from fedveil.data import Dataset, Images
from fedveil.defenses import Defense

_OTHERS = 5 * (CANDIDATES - 1)


def picked_out(
    defense: Defense,
    informed: Observation,
    data: Dataset,
    used: Tensor,
    *,
    seed: int,
    scored: int | None = None,
) -> dict[bool, Tensor]:
    """Return how surely each image stands out among 100 candidates, 99 of which were not used.

    The others are training images like those that were used, in other clients' shares or in other
    rounds', so that no model knows one kind better than the other.

    Args:
        defense: What the clients do.
        informed: The observation, with all public knowledge.
        data: What is learnt; its test images are the attacker's own.
        used: Int64 [M], which training images are behind the updates, one victim after the other.
        seed: Seeds the choice of the others, and of those that are scored.
        scored: How many images of each victim are scored, drawn at random; None for all.

    Returns:
        Whether the attacker knows the defence to the probabilities, float64 [M], that an image
        scores above 99 others drawn from up to 495; empty where every training image was used.
    """
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(data.train), generator=generator)
    others = order[~torch.isin(order, used)][:_OTHERS]
    if not len(others):
        return {}
    attack, found = GradientMembership(), {}
    members = used.reshape(informed.victims, -1)
    if scored is not None:
        members = members[:, torch.randperm(members.shape[1], generator=generator)[:scored]]
    suspects = data.train[torch.cat([members.flatten(), others])]
    public, batches = data.test[: attack.public], torch.arange(members.numel()).view_as(members)
    for attacker in attackers(defense, informed, MEMBERSHIP, inverse=False):
        known = defense.transform if attacker.adaptive else None
        scores = attack(
            attacker.observation, _as_trained(suspects, known), _as_trained(public, known)
        )
        above = [
            recognised(own[batch], own[members.numel() :])
            for own, batch in zip(scores, batches, strict=True)
        ]
        found[attacker.adaptive] = torch.cat(above)
    return {False: found[False], True: found.get(True, found[False])}


def _as_trained(images: Images, transform: nn.Module | None) -> Images:
    if transform is None:
        return images
    with torch.no_grad():
        return Images(transform(images.pixels), images.labels)
