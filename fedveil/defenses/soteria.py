"""Soteria: the gradient of the representation layer, without what tells most of the image."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.func import jvp, vmap
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedveil.defenses.protocol import BALUNOVIC, Metadata, Tensors
from fedveil.errors import FedveilError
from fedveil.models import output_layer

_PROBES = 4
_TINY = 1e-12


@dataclass(frozen=True, kw_only=True)
class Soteria:
    """Hide, from the gradient of the last linear layer's weight, the features that leak most.

    For each image the features r of the representation are ranked by ``|rᵢ| / ‖∂rᵢ/∂x‖``, and the
    share with the largest values enters the layer's weight gradient as 0. Neither logits nor any
    other gradient changes. The norms are estimated by 4 random directions in forward mode, all
    along one forward pass, instead of one backward pass a feature.

    Source: Sun et al., "Soteria: Provable Defense Against Privacy Leakage in Federated Learning
    from Representation Perspective", CVPR 2021, algorithm 1 with the 0-norm.

    Args:
        share: Share of the features that is hidden, 0 to below 1.
        layer: Qualified name of the layer, filled in by ``on``.

    Raises:
        FedveilError: A share out of range.
    """

    metadata: ClassVar = Metadata(
        attack="the perturbed layer's entries are not compared",
        broken_by=BALUNOVIC,
        strengths=("share=0.2", "share=0.8"),
        masks=True,
    )

    share: float
    layer: str | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.share < 1:
            raise FedveilError(f"share={self.share} is out of range: give 0 to below 1")

    @property
    def strength(self) -> float:
        """Share of the features that is hidden."""
        return self.share

    def on(self, model: nn.Module, shape: tuple[int, int, int]) -> "Soteria":
        """Return the defence with the model's layer named, as ``residual`` needs it.

        Raises:
            FedveilError: The logits are not the output of one linear layer.
        """
        return Soteria(share=self.share, layer=output_layer(model, shape))

    def residual(self, dummy: Tensors, observed: Tensors) -> dict[str, Tensor]:
        """Compare all but the entries of the layer's weight that were hidden from every image."""
        if self.layer is None:
            raise FedveilError("Soteria does not know the model; call on(model, shape) first")
        perturbed = f"{self.layer}.weight" if self.layer else "weight"
        # Among several images a column may be partly hidden, and nobody can tell; so it goes whole.
        return {name: value - observed[name] for name, value in dummy.items() if name != perturbed}

    @contextmanager
    def protecting(self) -> Iterator[None]:
        """Perturb the gradients of every model whose forward pass begins inside.

        The outermost module called on images [N, C, H, W] is taken as the model.
        """
        watch = _Watch(self)
        hooks = nn.modules.module
        before = hooks.register_module_forward_pre_hook(watch.enter)
        after = hooks.register_module_forward_hook(
            watch.leave,  # type: ignore[arg-type]
            always_call=True,
        )
        try:
            yield
        finally:
            before.remove()
            after.remove()


class _Watch:
    """Follows the calls of modules to find the model, its images and its last layer."""

    def __init__(self, defense: Soteria) -> None:
        self.share = defense.share
        self.depth = 0
        self.paused = False
        self.model: nn.Module | None = None
        self.images: Tensor | None = None
        self.layers: dict[int, nn.Module] = {}

    def enter(self, module: nn.Module, inputs: tuple[object, ...]) -> None:
        if self.paused:
            return
        self.depth += 1
        if self.depth == 1:
            first = inputs[0] if inputs else None
            known = isinstance(first, Tensor) and first.ndim == 4 and first.is_floating_point()
            self.model, self.images = (module, first) if known else (None, None)  # type: ignore[assignment]

    def leave(self, module: nn.Module, inputs: tuple[Tensor, ...], output: object) -> Tensor | None:
        if self.paused:
            return None
        self.depth -= 1
        if self.model is None or self.images is None or not torch.is_grad_enabled():
            return None
        if module is not self._layer(self.model, self.images):
            return None
        assert isinstance(module, nn.Linear)
        hidden = self._hidden(self.model, self.images, module, inputs[0])
        found: Tensor = _MaskedLinear.apply(  # type: ignore[no-untyped-call]
            inputs[0], module.weight, module.bias, hidden
        )
        return found

    def _layer(self, model: nn.Module, images: Tensor) -> nn.Module:
        if id(model) not in self.layers:
            _, channels, height, width = images.shape
            with self._pause():
                name = output_layer(model, (channels, height, width))
            self.layers[id(model)] = model.get_submodule(name)
        return self.layers[id(model)]

    def _hidden(self, model: nn.Module, images: Tensor, layer: nn.Module, r: Tensor) -> Tensor:
        """Return where features are hidden, bool [N, features]."""
        count = round(r.shape[1] * self.share)
        with self._pause():
            squares = _sensitivities(model, images.detach(), layer)
        rank = r.detach().abs() / (squares.sqrt() + _TINY)
        hidden = torch.zeros_like(rank, dtype=torch.bool)
        return hidden.scatter_(1, rank.topk(count, dim=1).indices, True)

    @contextmanager
    def _pause(self) -> Iterator[None]:
        self.paused = True
        try:
            yield
        finally:
            self.paused = False


def _sensitivities(model: nn.Module, images: Tensor, layer: nn.Module) -> Tensor:
    """Estimate the squared norm of each feature's gradient by the image, [N, features].

    In evaluation mode, so that no batch statistics move and no image acts on another's features.
    """
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _module, inputs: seen.append(inputs[0]))
    modes = {module: module.training for module in model.modules()}

    def features(shown: Tensor) -> Tensor:
        seen.clear()
        model(shown)
        return seen[0]

    def slope(direction: Tensor) -> Tensor:
        moved: Tensor = jvp(features, (images,), (direction,))[1]
        return moved

    try:
        model.eval()
        # The fused kernels of attention, which serve where no gradient is wanted, have no forward
        # derivative.
        with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
            slopes: Tensor = vmap(slope)(images.new_empty(_PROBES, *images.shape).normal_())
        # E (vᵀ∂r)² over normal v is ‖∂r‖².
        return slopes.detach().square().mean(dim=0)
    finally:
        handle.remove()
        for module, training in modes.items():
            module.training = training


class _MaskedLinear(torch.autograd.Function):
    """A linear layer whose gradient by the weight sees masked features.

    One node for both gradients: local training may step the weight as soon as its gradient is
    there, and the features' gradient needs the weight of before.
    """

    @staticmethod
    def forward(
        ctx: Any, features: Tensor, weight: Tensor, bias: Tensor | None, hidden: Tensor
    ) -> Tensor:
        ctx.save_for_backward(features.masked_fill(hidden, 0), weight)
        return F.linear(features, weight, bias)

    @staticmethod
    def backward(
        ctx: Any, *slopes: Tensor
    ) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        masked, weight = ctx.saved_tensors
        slope = slopes[0]
        needs = ctx.needs_input_grad
        return (
            slope @ weight if needs[0] else None,
            slope.mT @ masked if needs[1] else None,
            slope.sum(dim=0) if needs[2] else None,
            None,
        )
