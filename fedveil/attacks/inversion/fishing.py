"""An active server that fishes one class's images out of a large batch, or out of a sum."""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
from torch import nn

from fedveil.attacks.inversion.gradients import check_attackable, infer_labels
from fedveil.attacks.inversion.levenberg_marquardt import LevenbergMarquardt
from fedveil.attacks.inversion.observation import Attack, Inversion, Observation, Progress, Uses
from fedveil.errors import FedveilError, InapplicableAttackError
from fedveil.models.inspect import output_layer
from fedveil.types import Shape

_BAITED = 2.0  # times every other row's length; no row of an honest head was seen to stand out so
_CAUGHT = 0.05  # how far from a whole number of images a catch may be
_GREY = 0.5  # where nothing was caught


def bait(
    model: nn.Module,
    shape: Shape,
    target: int,
    *,
    confidence: float = 30.0,
    noise: float = 0.0,
    seed: int = 0,
) -> nn.Module:
    """Return a copy of a model whose head lets only one class's images move the rest.

    The rows of all other classes are zero, so that an image moves what lies before the head by
    ``(p_target - y_target)`` times the target's row; and the target is so unlikely that this is
    nearly 0 for images of other classes and nearly -1 for its own.

    Source: Wen et al., "Fishing for User Data in Large-Batch Federated Learning via Gradient
    Magnification", ICML 2022, section 3.1 (class fishing).

    Args:
        model: What an honest server would send; its logits are the output of one linear layer.
        shape: (C, H, W) of one image.
        target: The class to fish for.
        confidence: How much less likely than any other class the target is, in nats.
        noise: Standard deviation of the other rows, as a share of the entries of the target's row,
            for a server that would not be seen.
        seed: Seeds that noise.

    Raises:
        FedveilError: The logits are no linear layer's with a bias, or there is no such class.
    """
    baited = copy.deepcopy(model)
    head = baited.get_submodule(output_layer(baited, shape))
    if not isinstance(head, nn.Linear) or head.bias is None:
        raise FedveilError(
            f"model {type(model).__name__}: its last layer has no bias, so no class can be made "
            "unlikely for every image; fish with a model whose head has one"
        )
    if not 0 <= target < len(head.weight):
        raise FedveilError(
            f"target={target} is no class of this model; give 0 to {len(head.weight) - 1}"
        )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        row = head.weight[target].clone()
        disturbed = torch.randn(head.weight.shape, generator=generator).to(row)
        head.weight.copy_(noise * row.square().mean().sqrt() * disturbed)
        head.weight[target] = row
        head.bias.zero_()
        head.bias[target] = -confidence
    return baited


@dataclass(frozen=True, kw_only=True)
class Fishing:
    """Read the one image of the target class out of an update that a baited head caused.

    Of the head's gradient the target's row is ``-f/N`` for the one image of that class among N, f
    being what the head received, and its bias says how many such images there were. Everything
    before the head has the gradient of that image alone, divided by N. The head's other rows hold
    all images; what they would hold of the one is made from f. So an update over any number of
    images, of any number of clients, becomes one over a single image, which any attack inverts.

    Where the class was not caught exactly once, the answer is grey and the attack says that it
    cannot tell. The one image stands in every place of the batch.

    Source: Wen et al., "Fishing for User Data in Large-Batch Federated Learning via Gradient
    Magnification", ICML 2022, section 3.1. That the head's other rows are replaced is ours.

    Args:
        then: What inverts the single image's gradient.

    Shape: any batch or sum of one gradient step.

    Raises:
        FedveilError: On a call, a model whose head is not baited, or what ``then`` refuses.

    Example:
        >>> Fishing()(observation).images[:, 0]  # doctest: +SKIP
    """

    uses: ClassVar = Uses(linear=True)

    then: Attack = field(default_factory=LevenbergMarquardt)

    def __call__(self, observation: Observation, *, progress: Progress | None = None) -> Inversion:
        """Reconstruct every victim's image of the target class."""
        begin = time.perf_counter()
        check_attackable(observation, attack="fish", most=None)
        name, head, target = _baited(observation)
        images = torch.full((observation.victims, observation.images, *observation.shape), _GREY)
        labels = infer_labels(observation).cpu()
        loss = torch.full((observation.victims,), torch.inf, dtype=torch.float64)
        steps = torch.zeros(observation.victims, dtype=torch.int64)
        untold = torch.ones(observation.victims, dtype=torch.bool)
        for victim in range(observation.victims):
            caught = -observation.images * observation.gradients[f"{name}.bias"][victim, target]
            if abs(float(caught) - 1) < _CAUGHT:
                alone = _alone(observation.select(torch.tensor([victim])), name, head, target)
                found = self.then(alone)
                images[victim] = found.images[0, 0].to(images)
                loss[victim], steps[victim] = float(found.loss[0]), int(found.iterations[0])
                untold[victim] = False
            if progress:
                progress(victim + 1, observation.victims, float(loss[victim]))
        seconds = (time.perf_counter() - begin) / observation.victims
        return Inversion(
            images=images,
            labels=labels,
            loss=loss,
            seconds=torch.full((observation.victims,), seconds),
            iterations=steps,
            untold=untold,
        )


def fishing_by(then: Callable[[], Attack]) -> Callable[[], Attack]:
    """Return what makes a ``Fishing`` that inverts what it caught by another attack."""
    return lambda: Fishing(then=then())


def _baited(observation: Observation) -> tuple[str, nn.Linear, int]:
    """Return name and module of the head, and the class it fishes for."""
    model = observation.model
    try:
        name = output_layer(model, observation.shape)
    except FedveilError as error:
        raise InapplicableAttackError(f"{error}; nothing can be fished for with it") from error
    head = model.get_submodule(name)
    given = observation.gradients.keys() >= {f"{name}.weight", f"{name}.bias"}
    if not isinstance(head, nn.Linear) or not given:
        raise InapplicableAttackError(
            f"model {type(model).__name__}: its head {name} has no bias that is trained, so what "
            "was caught cannot be counted; use --attack ig"
        )
    lengths, order = head.weight.detach().norm(dim=1).sort(descending=True)
    if len(lengths) < 2 or float(lengths[0]) < _BAITED * float(lengths[1]):
        raise InapplicableAttackError(
            f"model {type(model).__name__}: no row of its head {name} stands out, so it fishes for "
            "no class; send what fedveil.attacks.inversion.bait makes of it (--checkpoint FILE), "
            "or use --attack ig"
        )
    return name, head, int(order[0])


def _alone(seen: Observation, name: str, head: nn.Linear, target: int) -> Observation:
    """Return the observation of one victim's only image of the target class."""
    weight, bias = (seen.gradients[f"{name}.{part}"][0, target] for part in ("weight", "bias"))
    received = weight / bias
    with torch.no_grad():
        missed = head(received.to(head.weight)).softmax(dim=0)
    missed[target] -= 1
    gradients = {key: seen.images * value for key, value in seen.gradients.items()}
    gradients[f"{name}.weight"] = torch.outer(missed, received)[None]
    gradients[f"{name}.bias"] = missed[None]
    return replace(seen, gradients=gradients, images=1)
