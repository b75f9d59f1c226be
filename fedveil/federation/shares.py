"""Clients' images as they train on them, kept where the work of making them can be saved."""

from collections.abc import Callable, Hashable
from dataclasses import dataclass, field

import torch
from torch import nn

from fedveil.data import Images

_BLOCK = 64  # images transformed at once: few enough to stay in a core's cache


@dataclass
class KeptShares:
    """Transformed shares of one federation's clients, as many as fit into a bounded memory.

    One process serves many clients in turn. What does not fit is made anew each time and pushes
    nothing out: with clients in turn the oldest share is the one needed next. Another federation
    empties the store.

    Attributes:
        limit: Most bytes of pixels that are kept.
    """

    limit: int
    _federation: Hashable = None
    _shares: dict[int, Images] = field(default_factory=dict)

    def get(self, federation: Hashable, client: int, make: Callable[[], Images]) -> Images:
        """Return a client's share, made by ``make`` unless it is kept.

        Args:
            federation: Whatever its clients' shares depend on, but the client.
            client: The client's partition.
            make: Returns the share.
        """
        if federation != self._federation:
            self._federation, self._shares = federation, {}
        if client in self._shares:
            return self._shares[client]
        share = make()
        if self._bytes + share.raw.nbytes <= self.limit:
            self._shares[client] = share
        return share

    @property
    def _bytes(self) -> int:
        return sum(share.raw.nbytes for share in self._shares.values())


def is_fixed(transform: nn.Module) -> bool:
    """Return whether a transformation gives the same for the same image every time.

    It says so itself by an attribute ``fixed``; one that does not is applied anew in every step.
    """
    return bool(getattr(transform, "fixed", False))


def transformed(images: Images, transform: nn.Module) -> Images:
    """Return the images as float32 after ``transform``, which keeps their shape."""
    pixels = torch.empty(images.raw.shape)
    with torch.no_grad():
        for start in range(0, len(images), _BLOCK):
            part = slice(start, start + _BLOCK)
            pixels[part] = transform(images[part].pixels)
    return Images(pixels, images.labels)
