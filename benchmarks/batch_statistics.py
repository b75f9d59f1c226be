r"""What running statistics of batch normalisation tell of a batch: its features, colour, images.

    python benchmarks/batch_statistics.py --out docs/results

One local step of ``resnet-bn`` on CIFAR-100 training images, weights and statistics on the wire.
``features`` is how far the mean that the server recovers is from the batch's own, in every layer;
``colour`` how far the mean colour that it solves for from the first layer's alone is from the
batch's. The rest is what ``ig`` rebuilds with no prior on statistics, with that on the running ones
that were sent, and with that on the batch's own. The weight of the priors was chosen on another
client's images:

    python benchmarks/batch_statistics.py --victim 7 --weight 0.001 0.01 0.1 --updates 1 \
        --name batch-statistics-weight --out docs/results
"""

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from written import write_result

from fedveil.attacks.inversion import InvertingGradients, Observation
from fedveil.audit.metrics import over_updates
from fedveil.audit.scoring import Scorer
from fedveil.audit.settings import Watching
from fedveil.audit.watch import WatchedFederation
from fedveil.data import Dataset, load_dataset
from fedveil.defenses import parse_defense
from fedveil.models import ResNet, build_model
from fedveil.models.inspect import BATCH_NORMS

_MODEL = "resnet-bn"


def watched(
    data: Dataset, model: nn.Module, batch: int, updates: int, victim: int
) -> tuple[Observation, Tensor]:
    """Return what a server has of one client's steps, and which images are behind them."""
    watching = Watching(
        images=batch * updates, batch=batch, update="step", victim=victim, workers=1
    )
    federation = WatchedFederation(data, model, watching)
    return federation.observe(parse_defense("none")), federation.ground_truth()


def known(data: Dataset, model: ResNet, batch: int, updates: int, victim: int) -> dict[str, Any]:
    """Return how exactly the batch's mean features and its mean colour are known."""
    seen, used = watched(data, model, batch, updates, victim)
    public = data.test[:500].pixels
    usual = public.mean(dim=(0, 2, 3))
    features, colours, guessed = [], [], []
    for victim_, images in enumerate(used.reshape(updates, batch)):
        pixels = data.train[images].pixels
        own, spread = _means(model, pixels), _spreads(model, public)
        features += [
            float(((seen.statistics[name].mean[victim_] - mean).abs() / spread[name]).max())
            for name, mean in own.items()
        ]
        true = pixels.mean(dim=(0, 2, 3))
        found = _colour(model, data, seen.statistics["stem_norm"].mean[victim_])
        colours.append(float((found - true).abs().mean()))
        guessed.append(float((usual - true).abs().mean()))
    return {
        "batch": batch,
        "updates": updates,
        "layers": len(seen.statistics),
        "numbers": sum(2 * told.mean.shape[1] for told in seen.statistics.values()),
        "features": max(features),
        "colour": sum(colours) / updates,
        "colour_of_others": sum(guessed) / updates,
    }


def _inputs(model: nn.Module, pixels: Tensor) -> dict[str, Tensor]:
    given: dict[str, Tensor] = {}
    hooks = [
        module.register_forward_pre_hook(
            lambda _m, inputs, name=name: given.__setitem__(name, inputs[0].detach().double())
        )
        for name, module in model.named_modules()
        if isinstance(module, BATCH_NORMS)
    ]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        model.train()(pixels)
    model.load_state_dict(before)
    for hook in hooks:
        hook.remove()
    return given


def _means(model: nn.Module, pixels: Tensor) -> dict[str, Tensor]:
    return {name: given.mean((0, 2, 3)) for name, given in _inputs(model, pixels).items()}


def _spreads(model: nn.Module, pixels: Tensor) -> dict[str, Tensor]:
    """Return how much images' own means differ, by layer."""
    return {name: given.mean((2, 3)).std(0) for name, given in _inputs(model, pixels).items()}


def _colour(model: ResNet, data: Dataset, mean: Tensor) -> Tensor:
    """Return the one colour whose plain image has the first layer's means, by least squares."""
    plain = torch.cat([torch.zeros(1, 3), torch.eye(3)])[..., None, None].expand(4, *data.shape)
    with torch.no_grad():
        answers = model.stem(model.normalise(plain)).mean((2, 3)).double()
    change = (answers[1:] - answers[0]).T
    return torch.linalg.lstsq(change, (mean - answers[0])[:, None]).solution[:, 0]


def rebuilt(
    data: Dataset, model: nn.Module, options: argparse.Namespace, batch: int
) -> Iterator[dict[str, Any]]:
    """Yield what each prior makes of the same updates."""
    seen, used = watched(data, model, batch, options.updates, options.victim)
    scorer = Scorer.of(data, used, None, 0)
    floors = scorer.floors(batch, knows=False)
    plain = InvertingGradients(steps=options.steps, tv=options.tv, keep=options.keep)
    arms: Mapping[str, tuple[float, Observation]] = {
        "none": (0.0, seen),
        **{f"running:{w:g}": (w, replace(seen, statistics={})) for w in options.weight},
        **{f"own:{w:g}": (w, seen) for w in options.weight},
    }
    for name, (weight, observation) in arms.items():
        result = replace(plain, batch_norm=weight)(observation)
        _, scores = scorer.score(result, knows=False)
        prior, _, given = name.partition(":")
        row = {"batch": batch, "updates": options.updates, "prior": prior, "weight": given or None}
        updates = {name: values.reshape(options.updates, -1) for name, values in scores.items()}
        told = over_updates(updates["identified"])
        row |= {"identified": told.value, "identified_low": told.low, "identified_high": told.high}
        row |= {"identified_floor": float(floors["identified"].mean())}
        # Medians over a batch, and their mean over updates, as the floor is taken.
        decibels = updates["psnr_original"].median(dim=1).values
        row |= {"psnr_original": float(decibels.mean()), "psnr_updates": decibels.tolist()}
        lowest = floors["psnr_original"].reshape(options.updates, -1).median(dim=1).values
        row |= {"psnr_original_floor": float(lowest.mean())}
        row |= {"loss": result.loss.tolist()}
        row["seconds_per_image"] = float(scores["seconds_per_image"].mean())
        print(row, flush=True)
        yield row


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[8])
    parser.add_argument("--updates", type=int, default=4)
    parser.add_argument("--victim", type=int, default=0)
    parser.add_argument("--steps", type=int, default=600)
    parser.add_argument("--tv", type=float, default=0.2)
    parser.add_argument("--keep", type=int, default=64)
    parser.add_argument("--weight", type=float, nargs="+", default=[0.01])
    parser.add_argument("--name", default="batch-statistics")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data = load_dataset("cifar100", seed=0)
    model = build_model(_MODEL, data.shape, len(data.classes), seed=0).train()
    assert isinstance(model, ResNet)
    exact = [known(data, model, batch, 10, arguments.victim) for batch in (1, 8)]
    print(exact, flush=True)
    found: list[dict[str, Any]] = []
    for batch in arguments.batch:
        for row in rebuilt(data, model, arguments, batch):
            found.append(row)
            write_result(
                arguments.out / f"{arguments.name}.json", arguments, known=exact, rows=found
            )


if __name__ == "__main__":
    main()
