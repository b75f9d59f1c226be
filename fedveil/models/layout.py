"""The memory layout in which a model is fastest, where it bears it."""

import torch
from torch import Tensor, nn


def memory_layout(model: nn.Module, pixels: Tensor) -> torch.memory_format:
    """Return the fastest memory layout that a model bears, and put the model into it.

    Channels-last halves the time of convolutions on a CPU and changes no value. A model that calls
    ``view`` on what a convolution returns, or convolves in three dimensions, does not bear it.

    Args:
        model: Takes float pixels [N, C, H, W]; its mode is left as it was.
        pixels: A few of them.
    """
    training = model.training
    model.eval()
    try:
        model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        with torch.inference_mode():
            model(pixels.contiguous(memory_format=torch.channels_last))
    except RuntimeError:
        # What is wrong with the model itself is raised where it is used.
        model.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        return torch.contiguous_format
    finally:
        model.train(training)
    return torch.channels_last
