"""A client's trial of the model it received on its own images: do they all move it alike?"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fedveil.errors import FedveilError
from fedveil.secure_random import SecureGenerator

_FEWEST = 16  # images; of fewer, chance makes neurons alike


@dataclass(frozen=True)
class Responses:
    """How a model responds to a client's images.

    Attributes:
        reach: Median over images of how far the loss reaches the pixels, as a share of how far any
            other function of the logits does. About 1 in honest models.
        alike: Name of a linear layer to the most of its outputs that are alike over the images.
    """

    reach: float
    alike: dict[str, int]


@dataclass(frozen=True, kw_only=True)
class ResponseInspection:
    """Try a model on the client's own images, before anything is trained or sent.

    What is planted in the weights can be disguised there; what it does to images can less. Two
    things are looked at, by one forward and two backward passes:

    * **The loss must reach every image.** A head that fishes for one class passes on hardly
      anything of the others' loss. The gradient of an image's loss by its pixels, over the length
      of ``p - y``, is compared with that of a random function of the logits, which such a head
      passes on. The median over images is at least ``reach`` for an honest head.
    * **Neurons must not measure the same.** Bins of one projection are alike in what they say of
      the client's images, correlated above ``correlation``, even where their rows are disturbed
      and no longer parallel. An honest layer has at most ``neurons`` such outputs.

    What it does not see: a server that makes a class unlikely and leaves all rows as they are, one
    whose disturbance is large, layers without a bias, and leaks of honest models.
    docs/inversion-suite.md has the figures. It is a trip-wire, and no protection.

    Source: the attacks are Wen et al., "Fishing for User Data", ICML 2022, and Fowl et al.,
    "Robbing the Fed", ICLR 2022; the test is ours.

    Args:
        reach: Smallest median of an honest model.
        correlation: Above which two outputs count as alike, in [0, 1].
        neurons: Most outputs of one layer that may be alike.

    Example:
        >>> ResponseInspection().objection(model, images, labels)  # doctest: +SKIP
        'refused to train: the loss of most images reaches ...'
    """

    reach: float = 0.4
    correlation: float = 0.99
    neurons: int = 48

    def __call__(self, model: nn.Module, images: Tensor, labels: Tensor) -> Responses:
        """Return what is seen; the model's weights, mode and gradients are left as they were.

        Args:
            model: With the weights that were received.
            images: Float [N, C, H, W] in [0, 1], the client's own, at least 16.
            labels: Int64 [N].

        Raises:
            FedveilError: Fewer images than that.
        """
        if len(images) < _FEWEST:
            raise FedveilError(
                f"a model cannot be tried on {len(images)} images, of which chance makes neurons "
                f"alike; give at least {_FEWEST}"
            )
        outputs: dict[str, Tensor] = {}
        hooks = [
            module.register_forward_hook(
                lambda _m, _i, output, name=name: outputs.update({name: output.detach()})
            )
            for name, module in model.named_modules()
            if isinstance(module, nn.Linear) and module.bias is not None
        ]
        training = model.training
        model.eval()
        try:
            reach = _reach(model, images, labels)
        finally:
            model.train(training)
            for hook in hooks:
                hook.remove()
        return Responses(reach, {name: self._alike(value) for name, value in outputs.items()})

    def objection(self, model: nn.Module, images: Tensor, labels: Tensor) -> str | None:
        """Return why not to train on a model, in a sentence, or None.

        Raises:
            FedveilError: As of a call.
        """
        seen = self(model, images, labels)
        if not seen.reach >= self.reach:
            return (
                f"refused to train: the loss of most images reaches them {seen.reach:.2g} times as "
                f"far as other functions of the answers, where honest models have {self.reach} and "
                "more, so the update would be of a few images alone; ask who runs the server why"
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


def _reach(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the median of how far the loss reaches an image; 0 where nothing does."""
    pixels = images.detach().clone().requires_grad_()
    logits = model(pixels)
    missed = (logits.softmax(dim=1) - F.one_hot(labels, logits.shape[1])).detach()
    # A server that knew it could let just this function through.
    other = SecureGenerator().normal(*logits.shape).to(logits)
    other -= other.mean(dim=1, keepdim=True)  # as p - y, it sums to zero
    own, any_other = (
        torch.autograd.grad(logits, pixels, along, retain_graph=True)[0].flatten(1).norm(dim=1)
        / along.norm(dim=1).clamp_min(1e-30)
        for along in (missed, other)
    )
    heard = any_other > 0
    return float((own[heard] / any_other[heard]).median()) if bool(heard.any()) else 0.0
