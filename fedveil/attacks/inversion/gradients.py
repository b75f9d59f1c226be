"""The gradient a candidate image would have caused, and how far it is from the observed one."""

import copy
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedveil.attacks.inversion.observation import LocalSteps, Observation, UpdateKnowledge
from fedveil.errors import FedveilError, InapplicableAttackError
from fedveil.models import output_layer
from fedveil.types import Shape

_DROPOUTS = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
_BATCH_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
_NOTHING = 1e-30
_ROUNDING = 1e-4  # of a gradient's length
_REFINEMENTS = 10
_PRESENT = 0.3  # images; a class with fewer has no input worth estimating
_WHOLE = 10.0  # weight of the equation that shares sum to 1
_EQUAL = 0.1  # weight of equal shares; chosen on CIFAR-10 training images 30,000 to 39,999

Gradient = Mapping[str, Tensor]


class Factors(NamedTuple):
    """A linear layer's weight gradient before it is multiplied out: ``slopesᵀ · inputs``.

    Attributes:
        inputs: What the layer was given, [..., N, in].
        slopes: Derivatives of the loss by what it returned, [..., N, out].
    """

    inputs: Tensor
    slopes: Tensor


@dataclass(frozen=True)
class GradientMap:
    """The map from images and labels to the update that training on them causes.

    Attributes:
        model: Where the functions are; its own weights are not used. Layers of batch normalisation
            in training mode keep no running statistics here, so that they can be transformed.
        parameters: Trained weights, detached, by name.
        constants: Buffers and frozen weights, by name.
        local: The client's local training; None for a single gradient.
    """

    model: nn.Module
    parameters: dict[str, Tensor]
    constants: dict[str, Tensor]
    local: LocalSteps | None = None

    @classmethod
    def of(
        cls, observation: Observation, *, dtype: torch.dtype, device: torch.device
    ) -> "GradientMap":
        """Return the map of the observed model, computed in ``dtype`` on ``device``."""
        model = _without_running_statistics(observation.model)
        trained: dict[str, Tensor] = {}
        constants: dict[str, Tensor] = {}
        for name, parameter in model.named_parameters():
            place = trained if parameter.requires_grad else constants
            place[name] = parameter.detach().to(device, dtype)
        for name, buffer in model.named_buffers():
            kind = dtype if buffer.is_floating_point() else buffer.dtype
            constants[name] = buffer.detach().to(device, kind)
        return cls(model, trained, constants, observation.local)

    def __call__(
        self, images: Tensor, targets: Tensor, orders: Sequence[Tensor] = ()
    ) -> dict[str, Tensor]:
        """Return the gradient of the mean cross-entropy, for use under ``torch.func``.

        Under ``local`` it is the mean gradient along the path of the simulated local steps, which
        take the images in the order they are given in.

        Args:
            images: [N, C, H, W].
            targets: Int64 [N], or class probabilities [N, classes].
            orders: For each epoch after the first an int64 [N] permutation in which the local steps
                take the images; missing ones repeat the first epoch's order.
        """
        if self.local is None:
            return self._gradient(self.parameters, images, targets)
        own = torch.arange(len(images), device=images.device)
        weights = self.parameters
        for order in (own, *orders, *[own] * self.local.epochs)[: self.local.epochs]:
            for index in torch.split(order, self.local.batch_size):
                step = self._gradient(weights, images[index], targets[index])
                weights = {k: w - self.local.learning_rate * step[k] for k, w in weights.items()}
        length = self.local.learning_rate * self.local.steps(len(images))
        return {k: (w - weights[k]) / length for k, w in self.parameters.items()}

    def _gradient(
        self, weights: Mapping[str, Tensor], images: Tensor, targets: Tensor
    ) -> dict[str, Tensor]:
        def loss(parameters: dict[str, Tensor]) -> Tensor:
            logits = functional_call(self.model, {**parameters, **self.constants}, (images,))
            return F.cross_entropy(logits, targets)

        with differentiable_attention():
            return dict(torch.func.grad(loss)(dict(weights)))

    def factored(
        self, images: Tensor, targets: Tensor, layers: Sequence[str]
    ) -> dict[str, Tensor | Factors]:
        """Return the gradient of the mean cross-entropy, some layers' weights as factors.

        The weights of a linear layer are many and their gradient has the rank of the batch, so that
        its length and its angle to another take no more than its factors.

        Source: Goodfellow, "Efficient Per-Example Gradient Computations", 2015.

        Args:
            images: [N, C, H, W].
            targets: Int64 [N], or class probabilities [N, classes].
            layers: As ``linear_layers`` returns them.
        """
        held = {f"{name}.weight" for name in layers}
        own = {k: weight for k, weight in self.parameters.items() if k not in held}
        fixed = {**self.constants, **{k: self.parameters[k] for k in held}}
        shifts = {
            k: images.new_zeros(len(images), len(self.parameters[f"{k}.weight"])) for k in layers
        }

        def loss(
            parameters: dict[str, Tensor], shifts: dict[str, Tensor]
        ) -> tuple[Tensor, dict[str, Tensor]]:
            with _shifted(self.model, shifts) as inputs:
                logits = functional_call(self.model, {**parameters, **fixed}, (images,))
            return F.cross_entropy(logits, targets), inputs

        with differentiable_attention():
            (gradients, slopes), inputs = torch.func.grad(loss, argnums=(0, 1), has_aux=True)(
                own, shifts
            )
        factors = {f"{name}.weight": Factors(inputs[name], slopes[name]) for name in layers}
        return {**gradients, **factors}

    def linear_layers(self, images: Tensor) -> tuple[str, ...]:
        """Return the linear layers whose weight's gradient is what ``Factors`` describe.

        Those that see each image once and as one row, and whose weight nothing else uses.

        Args:
            images: [N, C, H, W] to try it on, as they are attacked.
        """
        seen: dict[str, list[int]] = {}
        layers = {
            name: module
            for name, module in self.model.named_modules()
            if name and isinstance(module, nn.Linear) and f"{name}.weight" in self.parameters
        }
        hooks = [
            module.register_forward_hook(
                lambda _m, inputs, _o, name=name: seen.setdefault(name, []).append(inputs[0].ndim)
            )
            for name, module in layers.items()
        ]
        try:
            with torch.no_grad():
                state = {**self.parameters, **self.constants}
                logits = functional_call(self.model, state, (images,))
        finally:
            for hook in hooks:
                hook.remove()
        once = [name for name, ranks in seen.items() if ranks == [2]]
        targets = logits.argmin(dim=1)
        whole, factored = self(images, targets), self.factored(images, targets, once)
        return tuple(name for name in once if _same(factored[f"{name}.weight"], whole, name))

    def distance(self, images: Tensor, labels: Tensor, observation: Observation) -> Tensor:
        """Return the attacker's own loss for each victim, float [V].

        It is the squared distance of the gradients as a share of the observed one's squared length,
        both without what a known sanitiser destroyed.

        Args:
            images: [V, N, C, H, W].
            labels: Int64 [V, N].
            observation: With the V victims' gradients.
        """
        losses = []
        with torch.no_grad():
            for victim in range(len(images)):
                gradient = self(images[victim], labels[victim])
                observed = {k: observation.gradients[k][victim].to(g) for k, g in gradient.items()}
                dummy, left = surviving(gradient, observed, observation.sanitizer)
                missed = sum((dummy[k] - left[k]).square().sum() for k in left)
                size = sum(value.square().sum() for value in left.values())
                losses.append(missed / torch.as_tensor(size).clamp_min(1e-30))
        return torch.stack(losses)


@contextmanager
def _shifted(model: nn.Module, shifts: Mapping[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Add ``shifts`` to what the layers return, and yield what each of them is given."""
    given: dict[str, Tensor] = {}

    def shift(name: str, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
        given[name] = inputs[0]
        return output + shifts[name]

    hooks = [
        model.get_submodule(name).register_forward_hook(
            lambda _module, inputs, output, name=name: shift(name, inputs, output)
        )
        for name in shifts
    ]
    try:
        yield given
    finally:
        for hook in hooks:
            hook.remove()


def _same(factors: Tensor | Factors, whole: Gradient, name: str) -> bool:
    assert isinstance(factors, Factors)
    multiplied, expected = factors.slopes.mT @ factors.inputs, whole[f"{name}.weight"]
    missed = (multiplied - expected).norm()
    return bool(missed <= _ROUNDING * expected.norm())


def surviving(
    dummy: Gradient, observed: Gradient, sanitizer: UpdateKnowledge | None
) -> tuple[Gradient, Gradient]:
    """Return a candidate's update and the observed one without what a sanitiser destroyed.

    Args:
        dummy: Parameter name to a tensor of the parameter's shape.
        observed: The same names and shapes.
        sanitizer: What is known of it; None keeps everything.
    """
    if sanitizer is None:
        return dummy, observed
    empty = {name: torch.zeros_like(value) for name, value in observed.items()}
    kept = {name: -value for name, value in sanitizer.residual(empty, observed).items()}
    missed = sanitizer.residual(dummy, observed)
    return {name: missed[name] + value for name, value in kept.items()}, kept


def survived(observed: Gradient, sanitizer: UpdateKnowledge | None) -> dict[str, Tensor]:
    """Return where an update still tells something after a known sanitiser.

    Args:
        observed: Parameter name to a float tensor of the parameter's shape.
        sanitizer: What is known of it; None destroyed nothing.

    Returns:
        The same names; bool tensors of the same shapes.
    """
    whole = {name: torch.ones_like(value) for name, value in observed.items()}
    # What is left of an update of ones: no sanitiser that is repeated turns a one into a zero.
    left, _ = surviving(whole, observed, sanitizer)
    return {
        name: left[name] != 0 if name in left else torch.zeros_like(value, dtype=torch.bool)
        for name, value in observed.items()
    }


@contextmanager
def differentiable_attention() -> Iterator[None]:
    """Compute attention by plain matrix products, whose gradient has a gradient of its own."""
    with sdpa_kernel(SDPBackend.MATH):
        yield


def _without_running_statistics(model: nn.Module) -> nn.Module:
    names = [
        name
        for name, module in model.named_modules()
        if module.training and isinstance(module, _BATCH_NORMS) and module.track_running_stats
    ]
    if not names:
        return model
    own = copy.deepcopy(model)
    for name in names:
        layer: Any = own.get_submodule(name)
        layer.running_mean = layer.running_var = layer.num_batches_tracked = None
        layer.track_running_stats = False
    return own


def infer_labels(observation: Observation) -> Tensor:
    """Return the labels that the last layer's gradient gives away, int64 [V, N], ascending.

    For one image the gradient of the last bias is ``p − y``, negative at the label only. For a
    batch it is the mean of that, so counts are solved for: row c of the last weight's gradient over
    entry c of the last bias's is about the mean input of that layer over the images of class c; the
    model's own output there gives the probabilities p of such an image; and the bias gradient is
    ``Σ_c n_c/N · (p_c − 1_c)``, whose non-negative solution n/N is rounded to counts that make up
    N. With the solution the inputs are estimated anew, a few times, and the one that explains both
    gradients best is kept. A model without a weight and a bias in its last layer is read class by
    class: the most negative one is taken, its share given back, and so on N times.

    Sources: Zhao et al., "iDLG: Improved Deep Leakage from Gradients", 2020, section 3.2 (one
    image); Ma et al., "Instance-wise Batch Label Restoration via Gradients in Federated Learning",
    ICLR 2023, section 4 (counts). Non-negative least squares instead of a pseudo-inverse and the
    repetition are ours.

    Raises:
        FedveilError: No parameter has a row for each class.
    """
    rows = [
        gradient
        for gradient in observation.gradients.values()
        if gradient.ndim in (2, 3) and gradient.shape[1] == observation.classes
    ]
    if not rows:
        raise InapplicableAttackError(
            f"no layer of the model has one row for each of {observation.classes} classes, so the "
            "label cannot be read off its gradient; use --attack dlg, which searches for the label"
        )
    layer = None if observation.images == 1 else _output(observation)
    if layer is None:
        return labels_one_by_one(rows[-1], observation.images)
    name, module = layer
    return torch.stack(
        [
            _labels_by_counts(
                module,
                observation.gradients[f"{name}.weight"][victim].detach().double().cpu(),
                observation.gradients[f"{name}.bias"][victim].detach().double().cpu(),
                observation.images,
            )
            for victim in range(observation.victims)
        ]
    )


def _output(observation: Observation) -> tuple[str, nn.Linear] | None:
    try:
        name = output_layer(observation.model, observation.shape)
    except FedveilError:
        return None
    module = observation.model.get_submodule(name)
    seen = observation.gradients.keys() >= {f"{name}.weight", f"{name}.bias"}
    return (name, module) if seen and isinstance(module, nn.Linear) else None


def labels_one_by_one(rows: Tensor, images: int) -> Tensor:
    """Return labels taken one by one from the last layer's gradient, int64 [V, images], ascending.

    Args:
        rows: The last bias's gradient [V, classes], or the last weight's [V, classes, features].
        images: Images in a batch.
    """
    slack = rows.detach().double().clone()
    if slack.ndim == 3:
        slack = slack.sum(dim=2) / slack.sum(dim=2).abs().sum(dim=1, keepdim=True)
    labels = []
    for _ in range(images):
        found = slack.argmin(dim=1)
        slack[torch.arange(len(slack)), found] += 1 / images
        labels.append(found)
    return torch.stack(labels, dim=1).sort(dim=1).values


def _labels_by_counts(layer: nn.Linear, weight: Tensor, bias: Tensor, images: int) -> Tensor:
    own = layer.weight.detach().double().cpu()
    offset = layer.bias.detach().double().cpu()
    classes = len(bias)
    safe = torch.where(bias.abs() > _NOTHING, bias, torch.full_like(bias, _NOTHING))
    inputs = weight / safe[:, None]
    best = torch.inf
    shares = bias.new_full((classes,), 1 / classes)
    for _ in range(_REFINEMENTS):
        missed = (inputs @ own.T + offset).nan_to_num().softmax(dim=1) - torch.eye(classes)
        solved = _shares(missed, bias)
        # Row c of the last weight's gradient is Σ_j n_j/N · (p_j − 1_j)_c · input_j.
        mixture = missed.T * solved
        off = (mixture.sum(dim=1) - bias).square().sum() / bias.square().sum().clamp_min(_NOTHING)
        off += (mixture @ inputs - weight).square().sum() / weight.square().sum().clamp_min(
            _NOTHING
        )
        if float(off) < best:
            best, shares = float(off), solved
        present = solved * images > _PRESENT
        inputs = inputs.clone()
        inputs[present] = torch.linalg.lstsq(
            mixture[:, present], weight, rcond=1e-6, driver="gelsd"
        ).solution
    return torch.repeat_interleave(torch.arange(classes), _rounded(shares * images, images))


def _shares(missed: Tensor, bias: Tensor) -> Tensor:
    """Return the classes' shares whose mixture of ``p − 1`` is the bias's gradient, [classes].

    They are not negative and sum to 1, and lean weakly towards equal ones, which settles them where
    a trained model tells little.
    """
    from scipy.optimize import nnls

    classes = len(bias)
    whole = torch.full((1, classes), _WHOLE)
    system = torch.cat([missed.T, whole, _EQUAL * torch.eye(classes)])
    equal = torch.full((classes,), _EQUAL / classes)
    wanted = torch.cat([bias, torch.tensor([_WHOLE]), equal])
    found = nnls(system.numpy(), wanted.double().numpy(), maxiter=100 * classes)[0]
    return torch.from_numpy(found / max(found.sum(), _NOTHING))


def _rounded(shares: Tensor, total: int) -> Tensor:
    """Return whole numbers that sum to ``total``, by the largest remainders."""
    counts = shares.floor().long()
    missing = total - int(counts.sum())
    counts[(shares - counts).argsort(descending=True)[:missing]] += 1
    return counts


def check_attackable(
    observation: Observation,
    *,
    attack: str,
    most: int | None,
    local: bool = False,
    batch_statistics: bool = False,
) -> None:
    """Refuse what an attack cannot take, before anything is computed.

    Args:
        observation: What is to be attacked.
        attack: Its name on the command line.
        most: Images in a batch that it handles; None for any number.
        local: Whether it simulates several local steps.
        batch_statistics: Whether it handles batch normalisation in training mode.

    Raises:
        FedveilError: Too large a batch, several local steps, dropout or batch normalisation in
            training mode, a forward pass that fails, or a model whose gradient does not follow its
            input.
    """
    if observation.local is not None and not local:
        raise InapplicableAttackError(
            f"--attack {attack} takes the gradient of one step, and the clients return weights "
            "after several; use --attack ig, which simulates the local steps"
        )
    if most is not None and observation.images > most:
        raise InapplicableAttackError(
            f"--attack {attack} handles batches of at most {most}, not of {observation.images} "
            "images; use --attack dlg, or observe smaller batches"
        )
    check_model(
        observation.model,
        observation.shape,
        observation.classes,
        images=observation.images,
        batch_statistics=batch_statistics,
    )


def _check_no_memory(model: nn.Module, shape: Shape, images: int) -> None:
    own = copy.deepcopy(model)
    before = {name: value.clone() for name, value in own.named_buffers()}
    try:
        with torch.no_grad():
            own(torch.zeros(max(images, 2), *shape))
    except Exception:  # the user's own code may raise anything, and the probe after this says it
        return
    for name, value in own.named_buffers():
        held = before.get(name)
        if (
            held is None
            or held.shape != value.shape
            or not torch.equal(held.nan_to_num(), value.nan_to_num())
        ):
            raise FedveilError(
                f"model {type(model).__name__}: its forward pass changes the buffer {name}, so no "
                "attack can repeat the client's gradient; leave that out, or observe clients that "
                "train in evaluation mode"
            )


def check_model(
    model: nn.Module,
    shape: Shape,
    classes: int,
    *,
    images: int = 1,
    batch_statistics: bool = False,
) -> None:
    """Refuse a model whose gradients no attack can match.

    Args:
        model: In the mode the client trains in.
        shape: (C, H, W) of one image.
        classes: Number of classes.
        images: Images in a batch.
        batch_statistics: Whether batch normalisation may be in training mode.

    Raises:
        FedveilError: Dropout or batch normalisation in training mode, a forward pass that fails or
            returns no finite logits, or a gradient that does not follow the input.
    """
    for name, module in model.named_modules():
        if module.training and isinstance(module, _DROPOUTS) and module.p > 0:
            raise FedveilError(
                f"layer {name} ({type(module).__name__}) draws at random in training mode, so the "
                "attacker cannot repeat the client's gradient; set its p to 0, or observe clients "
                "that train in evaluation mode"
            )
        if module.training and isinstance(module, _BATCH_NORMS) and not batch_statistics:
            raise InapplicableAttackError(
                f"layer {name} ({type(module).__name__}) is in training mode and mixes the images "
                "of a batch; use --attack ig, a model with group normalisation (--model resnet-gn "
                "is one), or observe clients that train in evaluation mode"
            )
    probed = _without_running_statistics(model)  # which a forward pass would change
    _check_no_memory(probed, shape, images)
    with differentiable_attention():
        logits, pixels = _probe(probed, shape, classes, images)
        follows = _follows(probed, logits, pixels)
    if not follows:
        raise FedveilError(
            f"model {type(model).__name__} is not differentiable: its gradient does not follow its "
            "input, so no gradient-matching attack applies; remove detach(), rounding or argmax "
            "from its forward pass"
        )
    if any(isinstance(module, nn.RNNBase) for module in model.modules()):
        _check_mapped(probed, shape, classes)


def _check_mapped(model: nn.Module, shape: Shape, classes: int) -> None:
    """Refuse recurrent layers whose gradients torch cannot take image by image."""
    parameters = {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}
    rest = {name: p.detach() for name, p in model.named_parameters() if not p.requires_grad}
    rest |= dict(model.named_buffers())

    def loss(own: dict[str, Tensor], pixels: Tensor) -> Tensor:
        # Two of one image, since batch normalisation may not train on one.
        batch = torch.stack([pixels, pixels + 1 / 255])
        logits = functional_call(model, {**own, **rest}, (batch,))
        return F.cross_entropy(logits, torch.zeros(2, dtype=torch.int64))

    try:
        with differentiable_attention():
            torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(
                parameters, torch.full((2, *shape), 0.5)
            )
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:160]
        raise FedveilError(
            f"model {type(model).__name__}: its gradient cannot be taken image by image "
            f"({reason}), so no audit can look at it, which says nothing about what it leaks; "
            "write the recurrent layer with torch's cells, or audit another model"
        ) from None


def _probe(model: nn.Module, shape: Shape, classes: int, count: int) -> tuple[Tensor, Tensor]:
    """Return logits of random images, and the images."""
    weights = [p for p in model.parameters() if p.requires_grad]
    if not weights:
        raise FedveilError(
            f"model {type(model).__name__} has no weight that is trained, so an update tells "
            "nothing of images; let at least one parameter require its gradient"
        )
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(count, *shape, generator=generator).to(weights[0]).requires_grad_()
    try:
        logits = model(images)
    except Exception as error:  # the model is the user's own code
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise FedveilError(
            f"model {type(model).__name__} fails on images of shape {shape} (C, H, W): "
            f"{reason}; give images of the size it takes, or another model"
        ) from error
    wanted = (count, classes)
    if not isinstance(logits, Tensor) or tuple(logits.shape) != wanted:
        got = tuple(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
        raise FedveilError(
            f"model {type(model).__name__} returns {got} where logits {wanted} are needed; give "
            "the number of classes it was built for"
        )
    if not torch.isfinite(logits).all():
        raise FedveilError(
            f"model {type(model).__name__} returns NaN or infinity for pixels in [0, 1]; give "
            "weights that have not diverged"
        )
    return logits, images


def _follows(model: nn.Module, logits: Tensor, images: Tensor) -> bool:
    if not logits.requires_grad:
        return False
    weights = [p for p in model.parameters() if p.requires_grad]
    labels = torch.zeros(len(logits), dtype=torch.int64, device=images.device)
    loss = F.cross_entropy(logits, labels)
    found = torch.autograd.grad(loss, weights, create_graph=True, allow_unused=True)
    total = sum((g.square().sum() for g in found if g is not None), images.new_zeros(()))
    if not total.requires_grad:
        return False
    back = torch.autograd.grad(total, images, allow_unused=True)[0]
    return back is not None and bool(back.abs().sum() > 0)


def variation(images: Tensor) -> Tensor:
    """Return the mean absolute difference of neighbouring pixels, [P, ..., H, W] to [P]."""
    across = (images[..., 1:] - images[..., :-1]).abs().flatten(1).mean(dim=1)
    return across + (images[..., 1:, :] - images[..., :-1, :]).abs().flatten(1).mean(dim=1)
