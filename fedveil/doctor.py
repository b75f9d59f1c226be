"""What this machine and these images allow: the first thing to look at when something is slow."""

import importlib.metadata
import os
import platform
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from fedveil.copies.calibration import certifiable
from fedveil.data import Dataset, cache, load_dataset, parse_partition
from fedveil.data.partition import partition
from fedveil.defenses.dp_sgd import DPSGD
from fedveil.errors import FedveilError
from fedveil.federation.engines.worker import usable_cores
from fedveil.federation.server_app import guessing, split_test
from fedveil.runs.config import TrainConfig
from fedveil.sealing import KEY_FILE

_FLOWER = "1.41"
_KNOWN = ("mnist", "cifar10", "cifar100")
_ROUNDS, _NOISE = 20, 1.0
_CALIBRATION, _BATCH = (
    TrainConfig.model_fields[name].default for name in ("calibration_images", "batch_size")
)


@dataclass(frozen=True)
class Check:
    """One line of ``fedveil doctor``.

    Attributes:
        name: What was looked at.
        found: What it is.
        advice: What to do about it; empty where nothing is to be done.
    """

    name: str
    found: str
    advice: str = ""


def examine(dataset: str, *, clients: int, cap: float, seed: int = 0) -> tuple[Check, ...]:
    """Look at the machine, the libraries, the data, and what a federation on them can have.

    Args:
        dataset: As ``load_dataset`` reads it.
        clients: How many share it.
        cap: Accuracy that copies are to stay below, in (0, 1).
        seed: As of a run.
    """
    return (*_machine(), *_data(), *_federation(dataset, clients, cap, seed))


def _machine() -> Iterator[Check]:
    cuda = torch.version.cuda
    build = f"{torch.__version__}, {'CPU build' if cuda is None else f'CUDA {cuda} build'}"
    unused = cuda is not None and not torch.cuda.is_available()
    yield Check(
        "torch",
        build,
        "no GPU is here, so install the CPU build of torch first: it is a tenth of the size"
        if unused
        else "",
    )
    flower = importlib.metadata.version("flwr")
    yield Check(
        "Flower",
        flower,
        "" if flower.startswith(_FLOWER) else f"fedveil is tested with {_FLOWER}: install that",
    )
    cores = usable_cores()
    threads = os.environ.get("OMP_NUM_THREADS", "as many as cores")
    yield Check(
        "cores",
        f"{cores} usable, Python {platform.python_version()}, OMP_NUM_THREADS {threads}",
        "one core: clients train one after the other" if cores == 1 else "",
    )


def _data() -> Iterator[Check]:
    root = os.environ.get("FEDVEIL_DATA")
    if root is None:
        yield Check("FEDVEIL_DATA", "not set: mnist, cifar10 and cifar100 come from the hub")
    else:
        there = [name for name in _KNOWN if (Path(root) / name).is_dir()]
        yield Check(
            "FEDVEIL_DATA",
            f"{root} holds {', '.join(there) or 'none of ' + ', '.join(_KNOWN)}",
            "" if there else "name the folder that holds them, or unset it to use the hub",
        )
    kept = cache.folder()
    nearest = next(place for place in (kept, *kept.parents) if place.exists())
    writable = os.access(nearest, os.W_OK)
    yield Check(
        "cache",
        f"{kept}{'' if writable else ', which cannot be written'}",
        "" if writable else "set FEDVEIL_CACHE: images are decoded anew in every process",
    )
    yield Check(
        KEY_FILE,
        os.environ.get(KEY_FILE) or "not set: models and keys of runs lie unencrypted",
    )


def _federation(name: str, clients: int, cap: float, seed: int) -> Iterator[Check]:
    try:
        data = load_dataset(name, seed=seed)
        shares = partition(
            data.train.labels, clients=clients, scheme=parse_partition("iid"), seed=seed
        )
    except FedveilError as error:
        yield Check(f"data {name}", "cannot be used", str(error))
        return
    least = min(len(share) for share in shares)
    yield Check(
        f"data {name}",
        f"{len(data.train):,} training images of {data.shape}, {len(data.classes)} classes; "
        f"{least:,} a client of {clients}",
        f"fewer than {_BATCH} images a client: ask for fewer --clients" if least < _BATCH else "",
    )
    yield _cap(data, cap, seed)
    yield _epsilon(least)


def _cap(data: Dataset, cap: float, seed: int) -> Check:
    try:
        images = split_test(data.test, _CALIBRATION, seed=seed).calibration
    except FedveilError as error:
        return Check(f"cap {cap:.0%}", "cannot be had", str(error))
    least, chance = certifiable(len(images), cap), guessing(images)
    told = f"{len(images):,} images to calibrate on, guessing is right on {chance:.0%}"
    if least < chance:
        return Check(
            f"cap {cap:.0%}",
            f"cannot be had: {told}",
            "set more test images aside (NAME@1/3), or raise --cap",
        )
    return Check(f"cap {cap:.0%}", f"can be had: {told}; copies are held below {least:.0%}")


def _epsilon(images: int) -> Check:
    batch = min(_BATCH, images)
    steps = _ROUNDS * -(-images // batch)
    privacy = DPSGD(noise=_NOISE)
    spent = privacy.epsilon(images=images, batch_size=batch, steps=steps)
    how = (
        f"ε = {spent:.1f} at δ = {privacy.delta:g} for one image, {_ROUNDS} rounds of one epoch, "
        f"batches of {batch}"
    )
    return Check(
        f"DP-SGD, noise {_NOISE:g}",
        how,
        "more than 10 promises little: more images a client, fewer rounds or more noise"
        if spent > 10
        else "",
    )
