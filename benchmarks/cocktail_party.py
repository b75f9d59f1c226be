r"""The Cocktail Party's authors' own code beside ``ica``, on the same gradients.

    git clone https://github.com/facebookresearch/cocktail_party_attack THEIRS
    python benchmarks/cocktail_party.py --theirs THEIRS --images 16 64 --out docs/results

One batch of CIFAR-100 images each, the gradient of a fresh network with one hidden layer of ReLU
units; their settings are those of their README for such networks. Nothing of theirs is in this
repository: it is imported from the clone, with empty modules in place of torchvision, torchtext and
their VGG, which this network does not use. Their published code sets the term of negative entropy
to zero before the losses are added, so that only variation and likeness count; both it and the
same with that line left out are run.

Their images come without sign, scale or offset, so each original is compared with the image whose
cosine to it is largest, after its mean is taken off, under the gain and offset that suit it best,
by the truth. So are ours here, and photographs of others: the floor.
"""

import argparse
import os
import sys
import tempfile
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from batches import network
from torch import Tensor, nn
from torch.nn import functional as F
from written import write_result

from fedveil.attacks.inversion import IndependentComponents, Observation
from fedveil.data import Dataset, load_dataset

_NEAR = 20.0  # decibels
_ZEROED = "            loss_ne = torch.tensor(0.0, device=self.device)\n"
_THEIRS = {"lr": 0.001, "tv": 3.1, "T": 12.4, "decor": 1.47, "nv": 0, "l1": 0, "ne": 1}
_ABSENT = (
    *("torchvision", "torchvision.datasets", "torchvision.transforms"),
    *("torchtext", "torchtext.vocab", "torchtext.data"),
    *("torchtext.data.utils", "torchtext.data.functional"),
)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--theirs", type=Path, required=True, help="a clone of their repository")
    parser.add_argument("--images", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--steps", type=int, default=25_000, help="of theirs; 25,000 is their own")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = load_dataset("cifar100", seed=arguments.seed)
    rows: list[dict[str, Any]] = []
    for images in arguments.images:
        for row in compared(data, images, arguments):
            rows.append(row)
            print(row, flush=True)
            write_result(arguments.out / "cocktail-party.json", arguments, rows=rows)


def compared(data: Dataset, images: int, arguments: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield what each attack makes of one batch."""
    hidden = 512 if images <= 16 else 1024
    order = torch.randperm(len(data.train), generator=torch.Generator().manual_seed(arguments.seed))
    own, others = data.train[order[:images]], data.train[order[images : 2 * images]]
    model = network(data, hidden, 1, centred=False)
    F.cross_entropy(model(own.pixels), own.labels).backward()
    gradients = {
        name: value.grad.detach()[None]
        for name, value in model.named_parameters()
        if value.grad is not None
    }
    seen = Observation(model, gradients, data.shape, len(data.classes), images)
    first = next(value for value in gradients.values() if value.ndim == 3)[0]
    runs = {
        "theirs": lambda: theirs(arguments, first, images, zeroed=True),
        "theirs, with negative entropy": lambda: theirs(arguments, first, images, zeroed=False),
        "ica:rounds=0": lambda: IndependentComponents(rounds=0)(seen).images[0].float(),
        "ica": lambda: IndependentComponents()(seen).images[0].float(),
        "photographs of others": lambda: others.pixels,
    }
    for name, run in runs.items():
        begin = time.process_time()
        found = run()
        spent = time.process_time() - begin
        distance = fitted(found, own.pixels)
        yield {
            "images": images,
            "hidden": hidden,
            "attack": name,
            "psnr": float(distance.median()),
            "above_20": float((distance > _NEAR).double().mean()),
            "cpu_seconds": spent,
        }


def fitted(found: Tensor, originals: Tensor) -> Tensor:
    """Return decibels of each original to the likest image, under its best gain and offset, [N]."""
    own, told = (
        one.double().flatten(1) - one.double().flatten(1).mean(dim=1, keepdim=True)
        for one in (originals, found)
    )
    cosine = (F.normalize(own, dim=1) @ F.normalize(told, dim=1).T).abs().amax(dim=1)
    left = own.square().mean(dim=1) * (1 - cosine.square())
    return -10 * left.clamp_min(1e-20).log10()


def theirs(arguments: argparse.Namespace, gradient: Tensor, images: int, *, zeroed: bool) -> Tensor:
    """Return the images that the authors' code finds in a first layer's gradient [out, in]."""
    source = arguments.theirs / "src"
    module = _imported(source, zeroed=zeroed)
    model = nn.Module()
    model.attack_index, model.model_type = 0, "fc"
    settings = argparse.Namespace(
        **_THEIRS,
        **{"batch_size": images, "ds": "cifar100", "model": "fc2", "n_iter": arguments.steps},
        **{"opt": "adam", "sch": "none", "sigma": 0.0, "C": 1.0, "use_labels": False},
        **{"exp_name": None, "defense": "nodef", "attack": "cp", "fi_method": "gm"},
        fl_alg="fedsgd",
    )
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder:
        # It keeps its whitening where it runs.
        os.chdir(folder)
        try:
            Path(module.get_attack_exp_path(settings)).mkdir(parents=True)
            attack = module.CocktailPartyAttack(model, [gradient], None, settings, 0)
            for _ in range(arguments.steps):
                attack.step()
            found: Tensor = attack.get_rec().detach()
        finally:
            os.chdir(before)
    return found


def _imported(source: Path, *, zeroed: bool) -> Any:
    """Return their module of gradient inversion, with the line that zeroes a term or without it."""
    for name in _ABSENT:
        sys.modules.setdefault(name, _Empty(name))
    ours = {name: sys.modules.pop(name, None) for name in ("datasets", "utils")}
    sys.path.insert(0, str(source))
    try:
        text = (source / "gradient_inversion.py").read_text(encoding="utf-8")
        if _ZEROED not in text:
            raise SystemExit(f"{source} is another version: it has no line that zeroes a term")
        module = types.ModuleType("gradient_inversion")
        code = text if zeroed else text.replace(_ZEROED, "")
        exec(compile(code, str(source), "exec"), vars(module))
    finally:
        sys.path.remove(str(source))
        sys.modules.update({name: one for name, one in ours.items() if one is not None})
    return module


class _Empty(types.ModuleType):
    """A module of which everything can be imported and nothing does anything."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return sys.modules.get(f"{self.__name__}.{name}", _Nothing)


class _Nothing:
    def __init__(self, *_: Any, **__: Any) -> None:
        pass


if __name__ == "__main__":
    main()
