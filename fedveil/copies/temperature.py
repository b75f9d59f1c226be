"""A high softmax temperature, under which noise kills the answer but hardly the gradient.

Multiplying the output layer by a positive factor leaves every answer of a model as it is, since the
largest logit stays the largest. It does change the cross entropy: small logits make every class
about as likely, whatever noise the layer carries, so clients' gradients with and without noise
differ little, and their first steps learn the output layer anew. Without it noise and model race
each other: trained on noised copies, a model makes its logits ever larger until the noise no longer
matters, and the noise is raised in turn.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fedveil.errors import FedveilError
from fedveil.models import output_layer, twins


@dataclass(frozen=True)
class Temperature:
    """Keeps the output layer at a fixed scale.

    Attributes:
        names: Parameters of the output layer.
        rms: Root mean square they are brought to.
    """

    names: tuple[str, ...]
    rms: float

    @classmethod
    def of(cls, model: nn.Module, shape: tuple[int, int, int], degree: float) -> "Temperature":
        """Return the temperature at which logits are ``degree`` times smaller than at the start.

        Args:
            model: The freshly initialised model, whose scale is taken as 1.
            shape: (C, H, W) of one image.
            degree: Above 0; 1 keeps the initial scale.

        Raises:
            FedveilError: The logits are not the output of one linear layer, or its weight is
                another layer's too.
        """
        layer = output_layer(model, shape)
        tied = twins(model)
        if shared := [n for n in (*tied, *tied.values()) if n.startswith(f"{layer}.")]:
            raise FedveilError(
                f"{shared[0]} is also the weight of another layer, so its scale cannot be set "
                "without changing the model's answers; use --temperature 0"
            )
        names = tuple(
            f"{layer}.{name}" if layer else name
            for name, _ in model.get_submodule(layer).named_parameters()
        )
        values = [model.get_parameter(name).detach() for name in names]
        return cls(names, _rms(values) / degree)

    def apply(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return ``weights`` with the output layer at this scale; the other tensors are shared."""
        scale = self.rms / max(_rms([weights[name] for name in self.names]), 1e-30)
        return {
            name: value * scale if name in self.names else value for name, value in weights.items()
        }


def _rms(values: list[Tensor]) -> float:
    return float(torch.cat([value.flatten().double() for value in values]).square().mean().sqrt())
