"""Images and their labels, as the rest of the package passes them around."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Images:
    """A labelled set of equally sized images.

    Attributes:
        raw: uint8 [N, C, H, W]; a quarter of the memory of ``pixels``, and exact. Or float32
            pixels, where a transformation made what bytes cannot hold.
        labels: int64 [N].
    """

    raw: Tensor
    labels: Tensor

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: Tensor | slice) -> "Images":
        """Return the images at ``index`` (int64 [M], bool [N] or a slice)."""
        return Images(self.raw[index], self.labels[index])

    @classmethod
    def joined(cls, parts: Sequence["Images"]) -> "Images":
        """Return the images of several sets, in order; as pixels where some of them are."""
        raw = [part.raw for part in parts]
        if len({some.dtype for some in raw}) > 1:
            raw = [part.pixels for part in parts]
        return cls(torch.cat(raw), torch.cat([part.labels for part in parts]))

    def doubles_of(self, others: "Images") -> Tensor:
        """Return which of them are, number by number, among other images, bool [N].

        Labels are not compared: who was trained on under one label is known under any.
        """
        same = self.raw.dtype == others.raw.dtype
        own, known = (one.raw if same else one.pixels for one in (self, others))
        seen = set(_digests(known))
        return torch.tensor([one in seen for one in _digests(own)], dtype=torch.bool)

    @property
    def firsts(self) -> Tensor:
        """Where each different image stands first, int64, in order."""
        places: dict[bytes, int] = {}
        for place, digest in enumerate(_digests(self.raw)):
            places.setdefault(digest, place)
        return torch.tensor([*places.values()], dtype=torch.int64)

    def transformed(self, transform: nn.Module | None) -> "Images":
        """Return them as a transformation of pixels leaves them; None leaves them alone."""
        if transform is None or not len(self):
            return self
        with torch.no_grad():
            return Images(transform(self.pixels), self.labels)

    @property
    def pixels(self) -> Tensor:
        """Float32 [N, C, H, W] in [0, 1]; transformed ones may lie a little outside."""
        if self.raw.is_floating_point():
            return self.raw
        return self.raw.to(torch.float32).div_(255)


def _digests(raw: Tensor) -> Iterator[bytes]:
    """Yield what tells each image from others, without holding all of them a second time."""
    for image in raw:
        content = image.contiguous().numpy()
        yield hashlib.blake2b(content.tobytes(), digest_size=16).digest()


@dataclass(frozen=True)
class Dataset:
    """A named dataset with a training and a test split.

    Attributes:
        name: What the user asked for.
        train: Images the clients share out among them.
        test: Images no client sees.
        classes: Name of each class; a label indexes it.
        left_out: Files that lie beside the images and are not read, each with the reason.
        remarks: What was decided in reading it, in words.
    """

    name: str
    train: Images
    test: Images
    classes: tuple[str, ...]
    left_out: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image."""
        channels, height, width = self.train.raw.shape[1:]
        return channels, height, width

    @property
    def digest(self) -> str:
        """SHA-256 of all images and labels in their order, and of the names of the classes."""
        told = hashlib.sha256(json.dumps(self.classes).encode())
        for images in (self.train, self.test):
            for part in (images.raw, images.labels):
                told.update(f"{part.dtype} {tuple(part.shape)}".encode())
                told.update(part.contiguous().numpy().data)
        return told.hexdigest()
