"""A client's look at the model it received: is it built to leak?"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from logging import WARNING

import torch
from flwr.app import Context, Error, Message
from flwr.clientapp.typing import ClientAppCallable, Mod
from flwr.common.logger import log
from torch import Tensor, nn
from torch.nn import functional as F

from fedveil.defenses.response_inspection import ResponseInspection

_TRAIN = "train"
_REFUSED = 403  # a code of this package's own; Flower's end below 100
_BLOCK = 1024
_DIFFERENT = 1e-6  # of thresholds, relative to their spread; rows that also share one are copies


@dataclass(frozen=True)
class Suspicion:
    """A layer whose rows look like a measurement in bins.

    Attributes:
        layer: Its name.
        rows: Rows nearly parallel to one of them, at thresholds that all differ.
        of: Rows in all.
    """

    layer: str
    rows: int
    of: int


@dataclass(frozen=True, kw_only=True)
class ModelInspection:
    """Find layers built to let single images be read off their gradient.

    A server that binds images to neurons gives many rows of a layer one direction and each its own
    threshold (an imprint block). The score of a layer is the largest number of rows whose direction
    is within ``cosine`` of one of them, opposite ones included, and whose thresholds (bias over
    length) differ. Trained layers were not seen to have such groups.

    What it does not stop: a server that knows of it. Rows disturbed by noise of their own size are
    no longer parallel, pass, and still separate most images of a batch, which
    ``ResponseInspection`` sees on a client's own images; docs/inversion-suite.md has the figures.
    Nor does it see a layer that separates images by random directions, as any wide layer does in
    small batches, or leaks that need no such layer. Layers without a bias have no thresholds and
    are not looked at. It is a trip-wire for the published attack, and no protection.

    Source: what it looks for is described in Fowl et al., "Robbing the Fed", ICLR 2022, section 3;
    the test is ours.

    Args:
        cosine: Smallest cosine of rows that count as parallel.
        rows: Most such rows an honest layer may have.
        entries: Rows shorter than this are not judged: in few dimensions chance makes parallels.

    Example:
        >>> ModelInspection()(model.state_dict())  # doctest: +SKIP
        (Suspicion(layer='measure', rows=128, of=128),)
    """

    cosine: float = 0.7
    rows: int = 8
    entries: int = 48

    def __call__(self, weights: Mapping[str, Tensor]) -> tuple[Suspicion, ...]:
        """Return what is suspicious in a model's state, by name of tensor."""
        found = [self.score(layer, weights) for layer in _layers(weights)]
        return tuple(item for item in found if item.rows > self.rows)

    def score(self, layer: str, weights: Mapping[str, Tensor]) -> Suspicion:
        """Return how many parallel rows a layer has, judged or not."""
        weight = weights[f"{layer}.weight"].detach().flatten(1).float()
        bias = weights[f"{layer}.bias"].detach().float()
        length = weight.norm(dim=1)
        alive = length > 0
        if weight.shape[1] < self.entries or not bool(alive.any()):
            return Suspicion(layer, 0, len(weight))
        directions = F.normalize(weight[alive], dim=1)
        threshold = bias[alive] / length[alive]
        most = 0
        for part in torch.split(torch.arange(len(directions)), _BLOCK):
            cosines = directions[part] @ directions.T
            for row in torch.nonzero((cosines.abs() > self.cosine).sum(dim=1) > most)[:, 0]:
                own = cosines[row]
                near = own.abs() > self.cosine
                most = max(most, _distinct(threshold[near] * own[near].sign()))
        return Suspicion(layer, most, len(weight))


Own = Callable[[Context], tuple[nn.Module, Tensor]]
"""Returns a client's model, whatever its weights, and images of its own to try it on."""


def inspect_model(
    inspection: ModelInspection | None = None,
    *,
    own: Own | None = None,
    responses: ResponseInspection | None = None,
) -> Mod:
    """Return a mod under which the client does not train on a model built to leak.

    Such a message is answered with an error that says what was found; nothing of the client's
    images has left it by then, and without ``own`` none has been used. Other messages pass.

    Args:
        inspection: What to look for in the weights; None for the defaults.
        own: Gives the client's model and some of its images, for the model that was received to be
            tried on them; None looks at the weights alone, which disguised rows and heads that fish
            for a class pass.
        responses: What to look for in that trial; None for the defaults.

    Example:
        >>> app = ClientApp(mods=[inspect_model(own=my_model_and_images)])  # doctest: +SKIP
    """
    look = inspection or ModelInspection()
    attempt = responses or ResponseInspection()

    def objection(state: dict[str, Tensor], context: Context) -> str | None:
        if found := look(state):
            return _sentence(found[0])
        if own is None:
            return None
        model, images = own(context)
        model.load_state_dict(state)
        return attempt.objection(model, images)

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        if message.metadata.message_type.partition(".")[0] != _TRAIN:
            return call_next(message, context)
        for arrays in message.content.array_records.values():
            if reason := objection(dict(arrays.to_torch_state_dict()), context):
                log(WARNING, reason)
                return Message(Error(_REFUSED, reason), reply_to=message)
        return call_next(message, context)

    return mod


def _sentence(found: Suspicion) -> str:
    return (
        f"refused to train: {found.rows} of {found.of} rows of layer {found.layer} measure the "
        "same direction at different thresholds, which separates single images in the update; ask "
        "who runs the server why"
    )


def _layers(weights: Mapping[str, Tensor]) -> list[str]:
    names = [name.removesuffix(".weight") for name in weights if name.endswith(".weight")]
    return [
        name
        for name in names
        if weights[f"{name}.weight"].ndim >= 2
        and f"{name}.bias" in weights
        and weights[f"{name}.bias"].shape == weights[f"{name}.weight"].shape[:1]
    ]


def _distinct(thresholds: Tensor) -> int:
    ordered = thresholds.sort().values
    spread = float(ordered[-1] - ordered[0])
    return 1 + int((ordered.diff() > _DIFFERENT * spread).sum()) if spread > 0 else 1
