"""An egress audit of a run, or of a model in a file."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from fedveil.audit.egress import EgressReport, EgressSettings, audit_egress
from fedveil.audit.leakage_run import load_checkpoint
from fedveil.data import Images, load_dataset, parse_partition
from fedveil.data.partition import partition
from fedveil.defenses import parse_defense
from fedveil.errors import FedveilError
from fedveil.federation.server_app import load_job
from fedveil.federation.task import ClientTask
from fedveil.models import build_model
from fedveil.progress import PlainLines
from fedveil.runs.directory import RunDirectory


def audit_run(path: Path, settings: EgressSettings, *, out: Path | None) -> EgressReport:
    """Audit the model that a run delivered.

    Those who were in its training are the images of the clients whose answers were averaged; the
    others are the report images, which nothing was learnt or chosen on.

    Args:
        path: Directory of the run.
        settings: How.
        out: Directory for egress.json; None writes nothing.

    Raises:
        FedveilError: The run is not complete, or has images at each client that are not here.
    """
    directory = RunDirectory.open(path)
    config = directory.config
    if config.engine == "deployed":
        raise FedveilError(
            f"{path} was trained on images that only its clients hold: an egress audit needs them; "
            "let each site run fedveil audit egress MODEL --dataset ITS-FOLDER --model NAME"
        )
    job = load_job(config)
    job.model.load_state_dict(directory.model())
    shares = partition(
        job.dataset.train.labels,
        clients=config.clients,
        scheme=parse_partition(config.partition),
        seed=config.seed,
    )
    took_part = sorted({client for record in directory.rounds() for client in record.clients})
    held = torch.cat([shares[client] for client in took_part or range(config.clients)])
    transform = parse_defense(config.defense).transform
    shape, classes = job.dataset.shape, len(job.dataset.classes)
    with _shown() as progress:
        report = audit_egress(
            job.model,
            lambda seed: build_model(config.model, shape, classes, seed=config.seed + seed),
            _as_trained(job.dataset.train[held], transform),
            _as_trained(job.evaluation.report, transform),
            settings,
            subject=str(path),
            training=ClientTask.of(config, job.dataset).training,
            progress=progress,
        )
    if out is not None:
        report.write(out)
    return report


def audit_model(
    weights: Path, dataset: str, model: str, settings: EgressSettings, *, out: Path | None
) -> EgressReport:
    """Audit a model in a file, trained on the training images of a dataset.

    Args:
        weights: File of the weights.
        dataset: As ``load_dataset`` reads it; its test images are those nobody trained on.
        model: As ``build_model`` reads it.
        settings: How.
        out: Directory for egress.json; None writes nothing.

    Raises:
        FedveilError: Anything the user can mend.
    """
    data = load_dataset(dataset, seed=settings.seed)
    classes = len(data.classes)
    released = build_model(model, data.shape, classes, seed=settings.seed)
    load_checkpoint(released, weights)
    with _shown() as progress:
        report = audit_egress(
            released,
            lambda seed: build_model(model, data.shape, classes, seed=settings.seed + seed),
            data.train,
            data.test,
            settings,
            subject=str(weights),
            progress=progress,
        )
    if out is not None:
        report.write(out)
    return report


def _as_trained(images: Images, transform: nn.Module | None) -> Images:
    if transform is None:
        return images
    with torch.no_grad():
        return Images(transform(images.pixels), images.labels)


@contextmanager
def _shown() -> Iterator[Callable[[int, int], None]]:
    plain = PlainLines()
    yield lambda done, total: plain("shadows", done, total, "trained")
