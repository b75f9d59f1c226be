"""The gradient a candidate image would have caused, and how far it is from the observed one."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F

from fedveil.attacks.inversion.observation import Observation, Shape
from fedveil.errors import FedveilError

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)

Gradient = Mapping[str, Tensor]


@dataclass(frozen=True)
class GradientMap:
    """The map from images and labels to the gradient that training on them causes.

    Attributes:
        model: Where the functions are; its own weights are not used.
        parameters: Trained weights, detached, by name.
        constants: Buffers and frozen weights, by name.
    """

    model: nn.Module
    parameters: dict[str, Tensor]
    constants: dict[str, Tensor]

    @classmethod
    def of(
        cls, observation: Observation, *, dtype: torch.dtype, device: torch.device
    ) -> "GradientMap":
        """Return the map of the observed model, computed in ``dtype`` on ``device``."""
        trained: dict[str, Tensor] = {}
        constants: dict[str, Tensor] = {}
        for name, parameter in observation.model.named_parameters():
            place = trained if parameter.requires_grad else constants
            place[name] = parameter.detach().to(device, dtype)
        for name, buffer in observation.model.named_buffers():
            kind = dtype if buffer.is_floating_point() else buffer.dtype
            constants[name] = buffer.detach().to(device, kind)
        return cls(observation.model, trained, constants)

    def __call__(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Return the gradient of the mean cross-entropy, for use under ``torch.func``.

        Args:
            images: [N, C, H, W].
            targets: Int64 [N], or class probabilities [N, classes].
        """

        def loss(parameters: dict[str, Tensor]) -> Tensor:
            logits = functional_call(self.model, {**parameters, **self.constants}, (images,))
            return F.cross_entropy(logits, targets)

        return dict(torch.func.grad(loss)(self.parameters))

    def distance(self, images: Tensor, labels: Tensor, observation: Observation) -> Tensor:
        """Return the attacker's own loss for each victim, float [V].

        It is the squared distance of the gradients as a share of the observed one's squared length.

        Args:
            images: [V, N, C, H, W].
            labels: Int64 [V, N].
            observation: With the V victims' gradients.
        """
        losses = []
        with torch.no_grad():
            for victim in range(len(images)):
                gradient = self(images[victim], labels[victim])
                missed = images.new_zeros(())
                size = images.new_zeros(())
                for name, value in gradient.items():
                    observed = observation.gradients[name][victim].to(value)
                    missed += (value - observed).square().sum()
                    size += observed.square().sum()
                losses.append(missed / size.clamp_min(1e-30))
        return torch.stack(losses)


def infer_labels(observation: Observation) -> Tensor:
    """Return the labels that the last layer's gradient gives away, int64 [V, N].

    The gradient of the last bias is the mean of ``p − y`` over the batch, negative only where a
    label is; the most negative class is taken, its share given back, and so on N times. A model
    without that bias is read by the sums of the last weight's rows.

    Source: Zhao et al., "iDLG: Improved Deep Leakage from Gradients", 2020, section 3.2.

    Raises:
        FedveilError: No parameter has a row for each class.
    """
    rows = [
        gradient
        for gradient in observation.gradients.values()
        if gradient.ndim in (2, 3) and gradient.shape[1] == observation.classes
    ]
    if not rows:
        raise FedveilError(
            f"no layer of the model has one row for each of {observation.classes} classes, so the "
            "label cannot be read off its gradient; use --attack dlg, which searches for the label"
        )
    slack = rows[-1].detach().double().clone()
    if slack.ndim == 3:
        slack = slack.sum(dim=2) / slack.sum(dim=2).abs().sum(dim=1, keepdim=True)
    labels = []
    for _ in range(observation.images):
        found = slack.argmin(dim=1)
        slack[torch.arange(len(slack)), found] += 1 / observation.images
        labels.append(found)
    return torch.stack(labels, dim=1)


def check_attackable(observation: Observation, *, attack: str, most: int | None) -> None:
    """Refuse what an attack cannot take, before anything is computed.

    Args:
        observation: What is to be attacked.
        attack: Its name on the command line.
        most: Images in a batch that it handles; None for any number.

    Raises:
        FedveilError: Too large a batch, dropout or batch normalisation in training mode, a forward
            pass that fails, or a model whose gradient does not follow its input.
    """
    if most is not None and observation.images > most:
        raise FedveilError(
            f"--attack {attack} handles batches of at most {most}, not of {observation.images} "
            "images; use --attack dlg, or observe smaller batches"
        )
    check_model(
        observation.model, observation.shape, observation.classes, images=observation.images
    )


def check_model(model: nn.Module, shape: Shape, classes: int, *, images: int = 1) -> None:
    """Refuse a model whose gradients no attack can match.

    Args:
        model: In the mode the client trains in.
        shape: (C, H, W) of one image.
        classes: Number of classes.
        images: Images in a batch.

    Raises:
        FedveilError: Dropout or batch normalisation in training mode, a forward pass that fails or
            returns no finite logits, or a gradient that does not follow the input.
    """
    for name, module in model.named_modules():
        if module.training and isinstance(module, _DROPOUTS) and module.p > 0:
            raise FedveilError(
                f"layer {name} ({type(module).__name__}) draws at random in training mode, so the "
                "attacker cannot repeat the client's gradient; set its p to 0, or observe clients "
                "that train in evaluation mode"
            )
        if module.training and isinstance(module, _BATCH_NORMS):
            raise FedveilError(
                f"layer {name} ({type(module).__name__}) is in training mode and mixes the images "
                "of a batch; use a model with group normalisation (--model resnet-gn is one), or "
                "observe clients that train in evaluation mode"
            )
    logits, pixels = _probe(model, shape, classes, images)
    if not _follows(model, logits, pixels):
        raise FedveilError(
            f"model {type(model).__name__} is not differentiable: its gradient does not follow its "
            "input, so no gradient-matching attack applies; remove detach(), rounding or argmax "
            "from its forward pass"
        )


def _probe(model: nn.Module, shape: Shape, classes: int, count: int) -> tuple[Tensor, Tensor]:
    """Return logits of random images, and the images."""
    weights = [p for p in model.parameters() if p.requires_grad]
    if not weights:
        raise FedveilError(
            f"model {type(model).__name__} has no weight that is trained, so an update tells "
            "nothing of images; let at least one parameter require its gradient"
        )
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, *shape, generator=generator).to(weights[0]).requires_grad_()
    try:
        logits = model(images)
    except Exception as error:  # the model is the user's own code
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FedveilError(
            f"model {type(model).__name__} fails on images of shape {shape} (C, H, W): "
            f"{reason}; give images of the size it takes, or another model"
        ) from error
    wanted = (count, classes)
    if not isinstance(logits, Tensor) or tuple(logits.shape) != wanted:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise FedveilError(
            f"model {type(model).__name__} returns {got} where logits {wanted} are needed; give "
            "the number of classes it was built for"
        )
    if not torch.isfinite(logits).all():
        raise FedveilError(
            f"model {type(model).__name__} returns NaN or infinity for pixels in [0, 1]; give "
            "weights that have not diverged"
        )
    return logits, images


def _follows(model: nn.Module, logits: Tensor, images: Tensor) -> bool:
    if not logits.requires_grad:
        return False
    weights = [p for p in model.parameters() if p.requires_grad]
    labels = torch.zeros(len(logits), dtype=torch.int64, device=images.device)
    loss = F.cross_entropy(logits, labels)
    found = torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True)
    total = sum((g.square().sum() for g in found if g is not None), images.new_zeros(()))
    if not total.requires_grad:
        return False
    back = torch.autograd.grad(total, images, allow_unused=True)[0]
    return back is not None and bool(back.abs().sum() > 0)
