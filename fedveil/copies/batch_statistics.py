"""Batch statistics of a noised copy, so that the clean model's own never leave the server."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedveil.models.inspect import BATCH_NORMS


def reestimate_batch_norm(
    model: nn.Module, weights: Mapping[str, Tensor], pixels: Tensor
) -> dict[str, Tensor]:
    """Return ``weights`` with batch statistics measured under those very weights.

    A copy that carried w's running means and variances would hand out a part of w, and one that
    carried none would look weaker than it is to a thief with a few images of their own. Measured
    under the copy's weights they are what that thief would measure.

    Args:
        model: Architecture; its own state is left as it is.
        weights: State of the model by name.
        pixels: Unlabelled images, float [N, C, H, W] in [0, 1], N at least 2.

    Returns:
        A new state; tensors other than the statistics are shared with ``weights``.
    """
    state = dict(weights)
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, BATCH_NORMS) and module.track_running_stats
    }
    modes = {name: (layer.training, layer.momentum) for name, layer in layers.items()}
    for name, layer in layers.items():
        layer.train()
        layer.momentum = None  # a plain average over the batches
        for statistic, fresh in (("running_mean", 0.0), ("running_var", 1.0)):
            state[f"{name}.{statistic}"] = torch.full_like(weights[f"{name}.{statistic}"], fresh)
        tracked = f"{name}.num_batches_tracked"
        state[tracked] = torch.zeros_like(weights[tracked])
    try:
        with torch.no_grad():
            for batch in torch.split(pixels, 250):
                if len(batch) > 1:
                    functional_call(model, state, (batch,), tie_weights=False)
    finally:
        for name, layer in layers.items():
            layer.train(modes[name][0])
            layer.momentum = modes[name][1]
    return state
