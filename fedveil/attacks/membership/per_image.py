"""What each of some images would have put into an update, alone."""

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional as F

from fedveil.attacks.inversion.gradients import GradientMap, differentiable_attention, survived
from fedveil.attacks.inversion.observation import LocalSteps, Observation
from fedveil.data.images import Images

MOST_NUMBERS = 2**29
"""Of gradients held at once: 2 GiB."""

_COMPANIONS = 15
# What no longer fits a core's cache takes longer at once, what is small takes less: an image's
# gradient, or what a first layer of sixteen channels makes of it and of those beside it.
_NUMBERS_AT_ONCE = 2**21
_CHANNELS = 16
_FEWEST, _MOST = 16, 128  # images at once

BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
"""Layers that may take their statistics from the batch."""


@dataclass(frozen=True)
class PerImageGradients:
    """The gradient of single images, as rows of numbers, in the mode the client trains in.

    Where batch normalisation takes its statistics from the batch, an image alone has not the
    gradient that it has among others. It is then joined by public images, as many as it had beside
    it, whose loss does not count; a batch of one image has none.

    Attributes:
        map: Where the model and its weights are.
        names: Of the parameters, in the order of a row.
        companions: Float [B, C, H, W], public images that complete a batch; B = 0 without batch
            statistics.
        device: Where rows are.
    """

    map: GradientMap
    names: tuple[str, ...]
    companions: Tensor
    device: torch.device

    @classmethod
    def of(
        cls, observation: Observation, public: Images, device: torch.device
    ) -> "PerImageGradients":
        """Return the gradients of the observed model.

        Args:
            observation: Of any batch and any local training.
            public: Images that may stand beside a candidate in its batch.
            device: Where to compute.
        """
        model: nn.Module = copy.deepcopy(observation.model)
        together = _takes_batch_statistics(model)
        for module in model.modules():
            # Dropout draws anew for whoever asks; nothing but batch statistics is repeatable.
            if not isinstance(module, BATCH_NORMS):
                module.training = False
        alone = GradientMap.of(
            Observation(model, observation.gradients, observation.shape, observation.classes),
            dtype=torch.float32,
            device=device,
        )
        beside = min(_COMPANIONS, observation.images - 1) if together else 0
        companions = public[:beside].pixels.to(device)
        return cls(alone, tuple(alone.parameters), companions, device)

    @property
    def length(self) -> int:
        """Numbers in a row."""
        return sum(value.numel() for value in self.map.parameters.values())

    def each(self, images: Images) -> Iterator[Tensor]:
        """Yield the gradients of some images after another, float32 [n, D]."""

        def loss(parameters: dict[str, Tensor], pixels: Tensor, label: Tensor) -> Tensor:
            batch = torch.cat([pixels[None], self.companions])
            logits = functional_call(self.map.model, {**parameters, **self.map.constants}, (batch,))
            return F.cross_entropy(logits[:1], label[None])

        def one(pixels: Tensor, label: Tensor) -> Tensor:
            with differentiable_attention():
                found = grad(loss)(dict(self.map.parameters), pixels, label)
            return torch.cat([found[name].flatten() for name in self.names])

        _, _, height, width = images.raw.shape
        shown = _CHANNELS * height * width * (1 + len(self.companions))
        step = max(_FEWEST, min(_NUMBERS_AT_ONCE // max(self.length, shown), _MOST))
        for start in range(0, len(images), step):
            part = images[start : start + step]
            pixels, labels = part.pixels.to(self.device), part.labels.to(self.device)
            with torch.no_grad():
                yield vmap(one)(pixels, labels)

    def rows(self, updates: Mapping[str, Tensor]) -> Tensor:
        """Return updates, parameter name to [V, ...], as float32 [V, D]."""
        parts = [updates[name].flatten(1).to(self.device, torch.float32) for name in self.names]
        return torch.cat(parts, dim=1)

    def sent(self, observation: Observation) -> Tensor | None:
        """Return where one victim's update tells something, float32 [1, D] of 0 and 1.

        Returns:
            None where all of it does.
        """
        if observation.sanitizer is None:
            return None
        own = {name: value[0] for name, value in observation.gradients.items()}
        told = survived(own, observation.sanitizer)
        return self.rows({name: value[None] for name, value in told.items()})

    def inputs(self, layer: str, images: Images) -> Tensor:
        """Return what a linear layer is given of each image, float32 [N, in].

        Args:
            layer: Name of a module that sees one row an image.
            images: Any.
        """
        given: list[Tensor] = []
        module: Any = self.map.model.get_submodule(layer)
        hook = module.register_forward_pre_hook(lambda _m, inputs: given.append(inputs[0]))
        state = {**self.map.parameters, **self.map.constants}
        step = 1 if len(self.companions) else 256
        try:
            with torch.no_grad():
                for start in range(0, len(images), step):
                    pixels = images[start : start + step].pixels.to(self.device)
                    batch = torch.cat([pixels, self.companions])
                    functional_call(self.map.model, state, (batch,))
                    given[-1] = given[-1][: len(pixels)]
        finally:
            hook.remove()
        return torch.cat(given)


def settled(model: nn.Module, public: Images) -> nn.Module:
    """Return a copy whose batch normalisation goes by public images where it went by batches.

    A batch of candidates would tell each candidate by its neighbours.

    Args:
        model: In the mode the client trains in; stays as it is.
        public: Images of nobody's training.
    """
    model = copy.deepcopy(model)
    moving: list[Any] = []
    like = next(model.parameters())
    for module in model.modules():
        if isinstance(module, BATCH_NORMS) and (module.training or not module.track_running_stats):
            module.track_running_stats, module.momentum = True, None
            module.running_mean = like.new_zeros(module.num_features)
            module.running_var = like.new_ones(module.num_features)
            module.num_batches_tracked = torch.zeros((), dtype=torch.int64, device=like.device)
            moving.append(module)
    model.eval()
    if moving:
        for module in moving:
            module.train()
        with torch.no_grad():
            for start in range(0, len(public), 256):
                model(public[start : start + 256].pixels.to(like.device))
        model.eval()
    return model


def train_as_client(
    model: nn.Module, images: Images, local: LocalSteps, generator: torch.Generator
) -> None:
    """Train a model in place as a client does, in the mode it is in."""
    moving = [parameter for parameter in model.parameters() if parameter.requires_grad]
    descent = torch.optim.SGD(moving, lr=local.learning_rate)
    device = moving[0].device
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(torch.randint(2**31, (), generator=generator)))  # of dropout
        for _ in range(local.epochs):
            order = torch.randperm(len(images), generator=generator)
            for index in torch.split(order, local.batch_size):
                if len(index) == 1 and local.batch_size > 1:
                    continue  # batch normalisation cannot train on one
                batch = images[index]
                descent.zero_grad(set_to_none=True)
                logits = model(batch.pixels.to(device))
                F.cross_entropy(logits, batch.labels.to(device)).backward()  # type: ignore[no-untyped-call]
                descent.step()


def _takes_batch_statistics(model: nn.Module) -> bool:
    return any(
        isinstance(module, BATCH_NORMS)
        and (module.training or not getattr(module, "track_running_stats", True))
        for module in model.modules()
    )
