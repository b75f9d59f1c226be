"""BlockDCT beside kornia, torch-dct and scipy, on 10,000 CIFAR-sized images.

All do the same to float32 [10000, 3, 32, 32]: DCT of every 8×8 block, the first coefficients in
zigzag order kept, and back. kornia has these transforms inside its JPEG codec only, so its own
private functions are called. The images are random: speed does not depend on what they show.
Contestants take turns, so that whatever else the machine does falls on all of them; quote the
ratios. The last figures are what the transformation adds to a training step of LeNet: applied in
every step, as the mod for users' own apps does, and once to a client's share, as fedveil's client
does.
Steps take turns too, and each reads its own batch from the client's images, bytes or transformed.
Seconds are the process's own, which change less with what else the machine does.

    python benchmarks/block_dct.py --out docs/results

Peers that are not installed are reported as absent: ``pip install kornia torch-dct``.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from torch import Tensor
from torch.nn import functional as F
from written import write_result

from fedveil.data import Images
from fedveil.defenses import BlockDCT, zigzag_mask
from fedveil.federation.shares import transformed
from fedveil.models import LeNet

Transform = Callable[[Tensor], Tensor]
SEED = 0
SHARE = 1_000  # images of the client whose steps are timed


def _blocks(images: Tensor) -> Tensor:
    return images.reshape(-1, 4, 8, 4, 8).transpose(2, 3)


def _image(blocks: Tensor, shape: torch.Size) -> Tensor:
    return blocks.reshape(-1, 4, 4, 8, 8).transpose(2, 3).reshape(shape)


def _fedveil(keep: int) -> Transform:
    return BlockDCT(keep=keep)


def _kornia(keep: int) -> Transform:
    jpeg = import_module("kornia.enhance.jpeg")
    gate = zigzag_mask(keep).float()

    def apply(images: Tensor) -> Tensor:
        blocks = _blocks(images).reshape(1, -1, 8, 8)
        # The codec works around 128; the shift touches the DC coefficient only.
        return _image(jpeg._idct_8x8(jpeg._dct_8x8(blocks) * gate), images.shape)

    return apply


def _torch_dct(keep: int) -> Transform:
    library = import_module("torch_dct")
    gate = zigzag_mask(keep).float()

    def apply(images: Tensor) -> Tensor:
        found = library.dct_2d(_blocks(images).contiguous(), norm="ortho")
        return _image(library.idct_2d(found * gate, norm="ortho"), images.shape)

    return apply


def _scipy(keep: int) -> Transform:
    from scipy.fft import dctn, idctn

    gate = zigzag_mask(keep).float().numpy()
    workers = torch.get_num_threads()

    def apply(images: Tensor) -> Tensor:
        found = dctn(_blocks(images).numpy(), axes=(-2, -1), norm="ortho", workers=workers)
        back = idctn(found * gate, axes=(-2, -1), norm="ortho", workers=workers)
        return _image(torch.from_numpy(back), images.shape)

    return apply


CONTESTANTS: dict[str, tuple[str, Callable[[int], Transform]]] = {
    "fedveil": ("fedveil", _fedveil),
    "kornia": ("kornia", _kornia),
    "torch-dct": ("torch-dct", _torch_dct),
    "scipy": ("scipy", _scipy),
}


def compare(images: Tensor, keep: int, rounds: int) -> dict[str, Any]:
    ready, results = {}, {}
    for name, (package, build) in CONTESTANTS.items():
        try:
            ready[name] = build(keep)
            results[name] = {"version": metadata.version(package)}
        except (ImportError, metadata.PackageNotFoundError):
            results[name] = {"absent": f"pip install {package}"}
    reference = ready["fedveil"](images)
    times: dict[str, list[float]] = {name: [] for name in ready}
    for turn in range(rounds + 1):
        for name in list(ready)[:: 1 if turn % 2 else -1]:
            begin = time.process_time()
            result = ready[name](images)
            if turn:
                times[name].append(time.process_time() - begin)
            results[name]["agrees_within"] = float((result - reference).abs().max())
    own = statistics.median(times["fedveil"])
    for name, seconds in times.items():
        results[name]["seconds"] = statistics.median(seconds)
        results[name]["seconds_all"] = seconds
        results[name]["times_fedveil"] = statistics.median(seconds) / own
    return results


def share_of_a_step(keep: int, batch: int, rounds: int) -> dict[str, Any]:
    """Compare steps of LeNet on plain images, transformed in every step, and transformed once."""
    model = LeNet((3, 32, 32), 100)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    raw = torch.randint(0, 256, (SHARE, 3, 32, 32), dtype=torch.uint8)
    plain = Images(raw, torch.randint(100, (SHARE,)))
    transform = BlockDCT(keep=keep)
    once = []
    for _ in range(7):
        begin = time.process_time()
        ready = transformed(plain, transform)
        once.append(time.process_time() - begin)

    def step(pixels: Tensor, labels: Tensor) -> None:
        optimiser.zero_grad()
        F.cross_entropy(model(pixels), labels).backward()
        optimiser.step()

    def hidden(index: Tensor) -> None:
        step(transform(plain[index].pixels), plain.labels[index])

    acts: dict[str, Callable[[Tensor], Any]] = {
        "plain": lambda index: step(plain[index].pixels, plain.labels[index]),
        "in_every_step": hidden,
        "once": lambda index: step(ready[index].pixels, ready.labels[index]),
    }
    times: dict[str, list[float]] = {name: [] for name in acts}
    alone = []
    for _ in range(rounds):
        index = torch.randint(SHARE, (batch,))
        for name, act in acts.items():
            begin = time.process_time()
            act(index)
            times[name].append(time.process_time() - begin)
        pixels = plain[index].pixels
        begin = time.process_time()
        transform(pixels)
        alone.append(time.process_time() - begin)
    medians = {name: statistics.median(seconds) for name, seconds in times.items()}

    def added(name: str) -> float:
        pairs = zip(times[name], times["plain"], strict=True)
        return statistics.median(own / other for own, other in pairs) - 1

    return {
        "batch": batch,
        "step_seconds": medians["plain"],
        "in_every_step_seconds": medians["in_every_step"],
        "once_seconds": medians["once"],
        "transform_seconds": statistics.median(alone),
        "share_in_every_step": statistics.median(alone) / medians["plain"],
        "added_in_every_step": added("in_every_step"),
        "added_once": added("once"),
        "once_for_all": {
            "images": SHARE,
            "seconds": statistics.median(once),
            "share_of_an_epoch": statistics.median(once) / SHARE * batch / medians["plain"],
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--keep", type=int, default=21)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    torch.manual_seed(SEED)
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    with torch.no_grad():
        peers = compare(torch.rand(args.images, 3, 32, 32), args.keep, args.rounds)
    report = {
        "seed": SEED,
        "threads": torch.get_num_threads(),
        "images": args.images,
        "keep": args.keep,
        "contestants": peers,
        "lenet_step": share_of_a_step(args.keep, args.batch, 30 * args.rounds),
    }
    print(json.dumps(report, indent=1))
    if args.out:
        write_result(args.out / "block_dct.json", args, **report)


if __name__ == "__main__":
    main()
