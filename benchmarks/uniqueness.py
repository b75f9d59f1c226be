"""How many pixels of one image the gradient determines, network by network: rank counting.

The derivative of the gradient's entries by the pixels, at an image a client trained on, in float64.
Where its rank is the number of pixels, no other image near it has the same gradient: then a search
that starts near enough can end there. Where it is less, no attack can tell the image from others.
Whether a search gets near is another question, which this does not answer.

    python benchmarks/uniqueness.py --out docs/results
"""

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, jvp, vmap
from torch.nn import functional as F
from written import write_result

from fedveil.data import Dataset, load_dataset
from fedveil.models import build_model

_ROWS = 3  # for each pixel, into which all equations are mixed
_TOGETHER = 64
_SMALL = (1e-4, 1e-5, 1e-6)  # of the largest singular value


def spectrum(model: nn.Module, pixels: Tensor, label: Tensor, seed: int) -> Tensor:
    """Return the singular values of the derivative of one image's gradient, descending, [P].

    Args:
        model: In the mode the client trains in.
        pixels: [C, H, W].
        label: Int64 [].
        seed: Seeds the mixing of equations, which keeps the rank.
    """
    model, pixels = model.double(), pixels.double()
    named = {name: p.detach() for name, p in model.named_parameters()}
    generator = torch.Generator().manual_seed(seed)
    length = sum(p.numel() for p in named.values())
    bucket = torch.randint(_ROWS * pixels.numel(), (length,), generator=generator)
    sign = torch.randint(2, (length,), generator=generator).double() * 2 - 1

    def equations(image: Tensor) -> Tensor:
        def loss(parameters: dict[str, Tensor]) -> Tensor:
            return F.cross_entropy(functional_call(model, parameters, (image[None],)), label[None])

        found = grad(loss)(named)
        return torch.cat([found[name].flatten() for name in named])

    along: Callable[[Tensor], Tensor] = vmap(lambda d: jvp(equations, (pixels,), (d,))[1])
    mixed = torch.zeros(pixels.numel(), _ROWS * pixels.numel(), dtype=torch.float64)
    for part in torch.arange(pixels.numel()).split(_TOGETHER):
        directions = F.one_hot(part, pixels.numel()).double().view(-1, *pixels.shape)
        with torch.no_grad():
            mixed[part] = mixed[part].index_add(1, bucket, along(directions) * sign)
    values: Tensor = torch.linalg.eigvalsh(mixed @ mixed.T).clamp_min(0).sqrt()
    return values.flip(0)


def network(name: str, data: Dataset, seed: int) -> nn.Module:
    """Return a registered network, or one of two that take the place of cnn's max pooling."""
    if not name.startswith("cnn-"):
        return build_model(name, data.shape, len(data.classes), seed=seed).train()
    cnn: Any = build_model("cnn", data.shape, len(data.classes), seed=seed)
    for place in (1, 4):
        cnn.body[place] = nn.AvgPool2d(2) if name == "cnn-average" else nn.Identity()
    if name == "cnn-strides":
        cnn.body[0].stride = cnn.body[3].stride = (2, 2)
    return cnn.train()  # type: ignore[no-any-return]


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dataset", default="cifar100")
    parser.add_argument("--model", nargs="+", default=["cnn", "cnn-strides", "cnn-average"])
    parser.add_argument("--images", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    data, rows = load_dataset(arguments.dataset, seed=arguments.seed), []
    for name in arguments.model:
        ranks = []
        for image, label in zip(
            data.test[: arguments.images].pixels, data.test[: arguments.images].labels, strict=True
        ):
            model = network(name, data, arguments.seed)
            values = spectrum(model, image, label, arguments.seed)
            ranks.append([int((values > small * values[0]).sum()) for small in _SMALL])
            print(name, ranks, flush=True)
        weights = sum(p.numel() for p in model.parameters())
        rows.append(
            {
                "model": name,
                "pixels": image.numel(),
                "weights": weights,
                "of_the_largest": _SMALL,
                "determined": ranks,
            }
        )
        print(rows[-1], flush=True)
        write_result(arguments.out / "uniqueness.json", arguments, rows=rows)


if __name__ == "__main__":
    main()
