"""Membership by span: what a linear layer was given lies in the row space of its update."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn

from fedveil.attacks.inversion.gradients import GradientMap
from fedveil.attacks.inversion.observation import Observation, Uses
from fedveil.attacks.membership.per_image import PerImageGradients
from fedveil.data.images import Images
from fedveil.errors import InapplicableAttackError

_LOST = 1e-2  # singular values below this share of the largest count little
_ROUNDED = 1e-5  # below this share they are rounding
_APART = 1e-2  # a residual this far under every public image's is no stranger's
_ENOUGH = 100  # public images, for such a verdict
_TINY = 1e-12


@dataclass(frozen=True, kw_only=True)
class Span:
    """Score candidate images by how much of a linear layer's input its update's rows explain.

    The gradient of a linear layer is ``Σ slope · inputᵀ`` over the images used, so that the input
    of each of them lies in the row space of the update, if the layer has at least as many outputs
    as there are images; with fewer, more of it lies there than of another image's. One singular
    value decomposition, no label, no noise drawn, and for the layer's own input no local step makes
    it forget. Natural images have much in common, which lies in that space whoever's they are;
    public images tell what, and everything is measured after whitening by them.

    Sources: the span is that of Petrov et al., "DAGER: Exact Gradient Inversion for Large Language
    Models", NeurIPS 2024, section 3, for text; whitening, and images, are ours.

    Args:
        ridge: Added to the public covariance before it is inverted, in means of its diagonal.
        public: Most public images to whiten by.
        device: Where to compute; None for a GPU when there is one.

    Shape: any batch, sum and local training; a model with a linear layer that sees one row an
    image.
    """

    uses: ClassVar = Uses()

    ridge: float = 0.1
    public: int = 512
    device: torch.device | None = None

    def __call__(self, observation: Observation, candidates: Images, public: Images) -> Tensor:
        """Return the candidates' scores, float64 [V, M], in [0, 1]: the share that is explained.

        Args:
            observation: Updates of V victims; what is known of a defence is not used.
            candidates: M images, as a client would have trained on them; labels are not used.
            public: Images that nobody trained on, treated in the same way.

        Raises:
            FedveilError: No linear layer of the model sees one row an image.
        """
        return self.judged(observation, candidates, public)[0]

    def judged(
        self, observation: Observation, candidates: Images, public: Images
    ) -> tuple[Tensor, Tensor]:
        """Return the scores of a call, and which candidates were used beyond doubt, bool [V, M].

        Those are the candidates of whose input the row space leaves a hundredth of what it leaves
        of the closest of at least 100 public images. An input that was not used lies in a space of
        fewer dimensions by accident only.

        Args:
            observation: As of a call.
            candidates: As of a call.
            public: As of a call.

        Raises:
            FedveilError: As of a call.
        """
        layer = self._layer(observation, public)
        known = layer.inputs(public[: self.public]).double()
        given = layer.inputs(candidates).double()
        explained = _explained(layer.updates, given, _whitening(known, self.ridge))
        return explained, _beyond_doubt(layer.updates, given, known)

    def _layer(self, observation: Observation, public: Images) -> "_Layer":
        device = self.device or torch.device("cuda" if torch.cuda.is_available() else "cpu")
        gradients = PerImageGradients.of(observation, public, device)
        probe = public[:2].pixels.to(device)
        fitting = _one_row_an_image(gradients.map, probe)
        if not fitting:
            raise InapplicableAttackError(
                "no linear layer of the model sees one row an image, so its update spans no "
                "images' inputs; use another attack"
            )
        # The widest input leaves the smallest share of its space to the images of others.
        name = max(fitting, key=fitting.__getitem__)
        return _Layer(gradients, name, observation.gradients[f"{name}.weight"].to(device))


def _explained(updates: Tensor, given: Tensor, whitening: Tensor) -> Tensor:
    """Return the share of each row of ``given`` that each update's rows explain, [V, M]."""
    given, scores = given @ whitening, []
    for update in updates:
        _, values, rows = torch.linalg.svd(update.double() @ whitening, full_matrices=False)
        weight = values.square() / (values.square() + (_LOST * values[0]).square() + _TINY)
        scores.append(((given @ rows.T).square() * weight).sum(1) / given.square().sum(1))
    return torch.stack(scores).cpu()


def _beyond_doubt(updates: Tensor, given: Tensor, known: Tensor) -> Tensor:
    """Return of which rows of ``given`` an update's rows leave next to nothing, bool [V, M]."""
    verdicts = []
    for update in updates:
        _, values, rows = torch.linalg.svd(update.double(), full_matrices=False)
        rows = rows[values > _ROUNDED * values[0]]
        if len(known) < _ENOUGH or len(rows) >= known.shape[1]:
            verdicts.append(torch.zeros(len(given), dtype=torch.bool))
            continue
        verdicts.append((_left(given, rows) < _APART * _left(known, rows).min()).cpu())
    return torch.stack(verdicts)


@dataclass(frozen=True)
class _Layer:
    gradients: PerImageGradients
    name: str
    updates: Tensor

    def inputs(self, images: Images) -> Tensor:
        return self.gradients.inputs(self.name, images)


def _one_row_an_image(map_: GradientMap, images: Tensor) -> dict[str, int]:
    """Return the linear layers that see each image once, as one row, and how wide it is."""
    seen: dict[str, list[torch.Size]] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _m, inputs, name=name: seen.setdefault(name, []).append(inputs[0].shape)
        )
        for name, module in map_.model.named_modules()
        if isinstance(module, nn.Linear) and f"{name}.weight" in map_.parameters
    ]
    try:
        with torch.no_grad():
            state = {**map_.parameters, **map_.constants}
            torch.func.functional_call(map_.model, state, (images,))
    finally:
        for hook in hooks:
            hook.remove()
    return {
        name: shapes[0][1]
        for name, shapes in seen.items()
        if len(shapes) == 1 and len(shapes[0]) == 2 and shapes[0][0] == len(images)
    }


def _whitening(known: Tensor, ridge: float) -> Tensor:
    """Return a matrix that whitens rows by the public inputs' second moment, float64 [in, in].

    Any square root of the inverse does: they differ by a rotation, which no score sees.
    """
    moment = known.T @ known / max(1, len(known))
    moment.diagonal().add_(ridge * moment.diagonal().mean() + _TINY)
    root = torch.linalg.cholesky(moment)
    whitening: Tensor = torch.linalg.solve_triangular(
        root, torch.eye(len(root), dtype=root.dtype, device=root.device), upper=False
    ).T
    return whitening


def _left(inputs: Tensor, rows: Tensor) -> Tensor:
    rest = inputs - inputs @ rows.T @ rows
    share: Tensor = rest.norm(dim=1) / inputs.norm(dim=1).clamp_min(_TINY)
    return share
