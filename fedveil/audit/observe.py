"""From a federation's own messages to what its server can be said to have."""

import copy
from collections.abc import Sequence

import torch
from flwr.app import ArrayRecord
from torch import Tensor, nn

from fedveil.attacks.inversion import LocalSteps, Observation, UpdateKnowledge
from fedveil.errors import FedveilError


def observation_from_records(
    model: nn.Module,
    sent: ArrayRecord,
    returned: Sequence[ArrayRecord],
    *,
    shape: tuple[int, int, int],
    classes: int,
    steps: LocalSteps | None = None,
    images: int = 1,
    knows: nn.Module | None = None,
    sanitizer: UpdateKnowledge | None = None,
) -> Observation:
    """Return what an honest-but-curious server has of clients that answered one model.

    Args:
        model: The architecture; its weights are not used.
        sent: The model as it went out.
        returned: What came back, one record a victim (or a round in which the same model went out):
            gradients, or weights.
        shape: (C, H, W) of one image.
        classes: Number of classes.
        steps: The local steps after which the weights came back, as the server configured them;
            None where the records hold gradients.
        images: Images in a victim's batch, as the reply counts them.
        knows: The image transformation that is public knowledge.
        sanitizer: What is publicly known of a change of the update.

    Raises:
        FedveilError: A record that lacks a weight of the model.
    """
    count = steps.steps(images) if steps else 0
    before = sent.to_torch_state_dict()
    own = copy.deepcopy(model)
    own.load_state_dict(before)
    trained = [name for name, p in own.named_parameters() if p.requires_grad]
    updates = [record.to_torch_state_dict() for record in returned]
    gradients: dict[str, Tensor] = {}
    rounding = 0.0
    for name in trained:
        if any(name not in update for update in updates):
            raise FedveilError(
                f"a reply lacks {name}; the client must return every weight it was sent"
            )
        stacked = torch.stack([update[name] for update in updates]) if updates else torch.empty(0)
        if steps is not None:
            # In float64, so that nothing is lost beyond what the client's own rounding lost.
            length = steps.learning_rate * count
            rounding += _rounding_energy(stacked) * count / length**2
            stacked = (before[name].double() - stacked.double()) / length
        gradients[name] = stacked
    size = sum(float(gradient.double().square().sum()) for gradient in gradients.values())
    return Observation(
        model=own,
        gradients=gradients,
        shape=shape,
        classes=classes,
        images=images,
        knows=knows,
        sanitizer=sanitizer,
        rounding=rounding / max(size, 1e-30),
        local=steps if count > 1 else None,
    )


def _rounding_energy(weights: Tensor) -> float:
    # A float is off by a uniform error of one unit in the last place, which is eps·2^exponent.
    _, exponent = torch.frexp(weights)
    unit = torch.finfo(weights.dtype).eps * torch.exp2(exponent.double() - 1)
    return float(unit.square().sum() / 12)
