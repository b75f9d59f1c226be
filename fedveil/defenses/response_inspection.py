"""A client's trial of the model it received on its own images: do they all move it alike?"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedveil.errors import FedveilError

_FEWEST = 16  # images; of fewer, chance makes neurons alike


@dataclass(frozen=True)
class Responses:
    """How a model responds to a client's images.

    Attributes:
        dominance: How much further the loudest class's logit reaches the pixels than the median
            class's. From 1 to 3 in honest models, as far as was seen; infinite where most classes
            reach no pixel.
        alike: Name of a linear layer to the most of its outputs that are alike over the images.
    """

    dominance: float
    alike: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class ResponseInspection:
    """Try a model on the client's own images, before anything is trained or sent.

    What is planted in the weights can be disguised there; what it does to images can less. Two
    things are looked at, by a forward pass and a backward pass for each class:

    * **Classes must reach images alike.** Behind a head that fishes for one class, only that class
      moves what lies before. The gradient of each logit, without what all have in common, by the
      pixels is as long for the loudest class as for the median one, up to ``dominance`` times.
    * **Neurons must not measure the same.** Bins of one projection are alike in what they say of
      the client's images, correlated above ``correlation``, even where their rows are disturbed
      and no longer parallel. An honest layer has at most ``neurons`` such outputs.

    What it does not see: anything of a head for two classes, a server that makes a class unlikely
    and leaves all rows as they are, one whose disturbance is large, layers without a bias, and
    leaks of honest models.
    docs/inversion-suite.md has the figures. It is a trip-wire, and no protection.

    Source: the attacks are Wen et al., "Fishing for User Data", ICML 2022, and Fowl et al.,
    "Robbing the Fed", ICLR 2022; the test is ours.

    Args:
        dominance: Most times that an honest model's loudest class reaches further than its median.
        correlation: Above which two outputs count as alike, in [0, 1].
        neurons: Most outputs of one layer that may be alike.

    Example:
        >>> ResponseInspection().objection(model, images)  # doctest: +SKIP
        'refused to train: one class reaches ...'
    """

    dominance: float = 5.0
    correlation: float = 0.99
    neurons: int = 48

    def __call__(self, model: nn.Module, images: Tensor) -> Responses:
        """Return what is seen; the model's weights, mode and gradients are left as they were.

        Args:
            model: With the weights that were received.
            images: Float [N, C, H, W] in [0, 1], the client's own, at least 16.

        Raises:
            FedveilError: Fewer images than that.
        """
        if len(images) < _FEWEST:
            raise FedveilError(
                f"a model cannot be tried on {len(images)} images, of which chance makes neurons "
                f"alike; give at least {_FEWEST}"
            )
        outputs: dict[str, Tensor] = {}
        training = model.training
        model.eval()
        try:
            dominance = _dominance(model, images[:_FEWEST])
            hooks = [
                module.register_forward_hook(
                    lambda _m, _i, output, name=name: outputs.update({name: output})
                )
                for name, module in model.named_modules()
                if isinstance(module, nn.Linear) and module.bias is not None
            ]
            try:
                with torch.no_grad():
                    model(images)
            finally:
                for hook in hooks:
                    hook.remove()
        finally:
            model.train(training)
        return Responses(dominance, {name: self._alike(value) for name, value in outputs.items()})

    def objection(self, model: nn.Module, images: Tensor) -> str | None:
        """Return why not to train on a model, in a sentence, or None.

        Raises:
            FedveilError: As of a call.
        """
        seen = self(model, images)
        if seen.dominance > self.dominance:
            return (
                f"refused to train: one class reaches this client's images {seen.dominance:.3g} "
                f"times as far as the others, and more than {self.dominance} times is the limit, "
                "so the update would be of that class's images alone; ask who runs the server why"
            )
        for layer, count in seen.alike.items():
            if count > self.neurons:
                return (
                    f"refused to train: {count} outputs of layer {layer} say the same of this "
                    "client's images up to a threshold, which separates single images in the "
                    "update; ask who runs the server why"
                )
        return None

    def _alike(self, outputs: Tensor) -> int:
        rows = outputs.flatten(0, -2).double().T
        rows = F.normalize(rows - rows.mean(dim=1, keepdim=True), dim=1)
        return int(((rows @ rows.T).abs() > self.correlation).sum(dim=1).max())


def _dominance(model: nn.Module, images: Tensor) -> float:
    """Return how much further the loudest class reaches images than the median class."""
    pixels = images.detach().clone().requires_grad_()
    logits = model(pixels)
    # A loss moves logits by p - y, which sums to zero: what all classes share moves nothing.
    apart = logits - logits.mean(dim=1, keepdim=True)
    lengths = torch.stack(
        [
            torch.autograd.grad(one.sum(), pixels, retain_graph=True)[0]
            .flatten(1)
            .norm(dim=1)
            .median()
            for one in apart.T
        ]
    )
    middle = float(lengths.median())
    return float(lengths.max()) / middle if middle > 0 else float("inf")
