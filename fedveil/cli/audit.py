"""``fedveil audit``."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from fedveil.cli.interrupted import NOTHING_WRITTEN, interruptible
from fedveil.errors import FedveilError
from fedveil.files import UNFINISHED, check_directory

audit = typer.Typer(help="Attack what a federation gives away, and measure.", no_args_is_help=True)


class ClientReturns(StrEnum):
    """What a client returns in ``fedveil audit leakage``."""

    GRADIENT = "gradient"
    STEP = "step"
    FEDAVG = "fedavg"


def _local_rate(update: ClientReturns) -> float:
    # The longer the one step, the less the rounding of the weights hides; several must converge.
    return 0.05 if update is ClientReturns.FEDAVG else 1.0


def _left_of(out: Path) -> str:
    kept = (out / UNFINISHED).is_dir()
    return f"the same command goes on from what {out} has" if kept else NOTHING_WRITTEN


@audit.command("leakage")
def audit_leakage(
    out: Annotated[
        Path, typer.Option(help="New directory for the results, or of an audit cut short.")
    ],
    dataset: Annotated[
        str, typer.Option(help="digits, photos, mnist, cifar10, cifar100, a hub name, a path.")
    ] = "photos",
    model: Annotated[
        str,
        typer.Option(help="lenet, another name of fedveil train, or package.module:factory."),
    ] = "lenet",
    checkpoint: Annotated[
        Path | None, typer.Option(help="Trained weights for it: .safetensors, or .pt of tensors.")
    ] = None,
    clients: Annotated[int, typer.Option(min=1, help="Clients in all.")] = 10,
    victim: Annotated[int, typer.Option(help="The client the server watches, from 0.")] = 0,
    images: Annotated[int, typer.Option(help="Its images in all.")] = 16,
    batch: Annotated[int, typer.Option(help="How many of them it uses in a round.")] = 1,
    aggregate: Annotated[
        int, typer.Option(help="Clients whose sum only the server sees; --images are of them all.")
    ] = 1,
    attack: Annotated[
        list[str] | None,
        typer.Option(
            help="dlg, idlg, rgap, lm, ig, ig-bn, fc, peel, ica, features, fish, fish-ig or "
            "latent, with its options as in ig:steps=600,restarts=2; may be repeated."
        ),
    ] = None,
    defense: Annotated[
        list[str] | None,
        typer.Option(help="none, dct:keep=N and others of docs/defenses.md; may be repeated."),
    ] = None,
    inverse: Annotated[
        bool,
        typer.Option("--inverse", help="Also learn, on test images, to undo transformations."),
    ] = False,
    update: Annotated[
        ClientReturns, typer.Option(help="What clients return.")
    ] = ClientReturns.GRADIENT,
    epochs: Annotated[int, typer.Option(help="Local epochs of --update fedavg.")] = 1,
    batch_size: Annotated[int, typer.Option(help="Local minibatch of --update fedavg.")] = 10,
    learning_rate: Annotated[
        float | None,
        typer.Option(help="Of local steps (default 1 for step, 0.05 for fedavg)."),
    ] = None,
    repeats: Annotated[
        int,
        typer.Option(help="Rounds of --update fedavg on the same images, told from together."),
    ] = 1,
    recorded: Annotated[
        Path | None,
        typer.Option(
            help="What record_messages wrote in a Flower app: audited in place of a federation."
        ),
    ] = None,
    before: Annotated[
        Path | None, typer.Option(help="Weights as the server sent them, with --after.")
    ] = None,
    after: Annotated[
        Path | None, typer.Option(help="Weights as one client returned them, with --before.")
    ] = None,
    truth: Annotated[
        Path | None,
        typer.Option(help="The images trained on, as tensors images and labels, to score by."),
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Worker processes; one a core.")] = None,
    seed: Annotated[int, typer.Option(help="Seeds model, partition and order.")] = 0,
) -> None:
    """Reconstruct a client's images from what the server receives, and score the result.

    Of a recording (--recorded, or --before and --after) --images and --batch follow from it,
    --victim counts the clients recorded, and --update, --epochs, --batch-size and --learning-rate
    say how the app trained: step for one step on all images, fedavg for more.

    Writes leakage.json, reconstructions.png and reconstructions.npz.
    """
    check_directory(out, new=not (out / UNFINISHED).is_dir())
    with interruptible(lambda: _left_of(out)):
        from fedveil.audit.leakage import LeakageSettings, run_leakage_audit
        from fedveil.audit.recorded import Recorded, run_recorded_audit
        from fedveil.memory import keep_freed_memory

        other = any((recorded, before, after))
        if truth and not other:
            raise FedveilError("--truth is for --recorded, or --before and --after: leave it out")
        if other and checkpoint:
            raise FedveilError("--checkpoint is in the recording already: leave it out")
        if other and update is ClientReturns.GRADIENT:
            update = ClientReturns.STEP  # a Flower app returns weights
        settings = LeakageSettings(
            clients=clients,
            victim=victim,
            images=images,
            batch=batch,
            aggregate=aggregate,
            inverse=inverse,
            attacks=tuple(attack or ("lm",)),
            defenses=tuple(defense or ("none",)),
            update=update.value,
            epochs=epochs,
            batch_size=batch_size,
            learning_rate=_local_rate(update) if learning_rate is None else learning_rate,
            repeats=repeats,
            seed=seed,
            workers=workers,
        )
        keep_freed_memory()
        if other:
            where = Recorded(recorded, before, after, truth)
            report = run_recorded_audit(dataset, model, settings, where, out=out)
        else:
            report = run_leakage_audit(dataset, model, settings, checkpoint=checkpoint, out=out)
    typer.echo(report.table())
    typer.echo(f"{out / 'leakage.json'}  {out / 'reconstructions.png'}")


@audit.command("trace")
def audit_trace(
    leaked: Annotated[Path, typer.Argument(help="The leaked model: .safetensors, or .pt.")],
    run: Annotated[Path, typer.Option(help="Directory of the run it may have come from.")],
    out: Annotated[Path | None, typer.Option(help="JSON file for the result.")] = None,
    alpha: Annotated[
        float, typer.Option(help="Chance to name anybody innocent, above 0 and below 1.")
    ] = 1e-6,
) -> None:
    """Name the clients a leaked model came from, by the fingerprints in their copies."""
    if not 0 < alpha < 1:
        raise FedveilError(f"--alpha {alpha:g} is not allowed: above 0 and below 1")
    with interruptible(NOTHING_WRITTEN):
        from fedveil.audit.trace import run_trace

        told = run_trace(leaked, run, alpha=alpha, out=out)
    typer.echo(told)


@audit.command("egress")
def audit_egress(
    target: Annotated[
        Path, typer.Argument(help="Directory of a run, or a file of weights: .safetensors or .pt.")
    ],
    out: Annotated[Path, typer.Option(help="Directory for egress.json.")],
    dataset: Annotated[
        str | None, typer.Option(help="Of a file of weights: what it was trained on.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Of a file of weights: the model, as of fedveil train.")
    ] = None,
    images: Annotated[int, typer.Option(help="Training images that are told from others.")] = 1_000,
    shadows: Annotated[int, typer.Option(help="Models trained to compare with; 0: none.")] = 4,
    companions: Annotated[
        int, typer.Option(help="Further training images that each of them learns from.")
    ] = 4_000,
    epochs: Annotated[int, typer.Option(help="Most passes of each of them.")] = 60,
    seed: Annotated[int, typer.Option(help="Seeds the images and the shadows.")] = 0,
) -> None:
    """Tell what a model that is about to leave gives away of who was in its training.

    Membership by loss, likelihood ratio and RMIA; AUC, members found at false-positive rates of 1 %
    and 0.1 %, and the images that are most exposed. Writes egress.json.
    """
    if target.is_file() and (dataset is None or model is None):
        raise FedveilError(
            f"{target} is a file of weights: give the --dataset it was trained on and its --model"
        )
    with interruptible(NOTHING_WRITTEN):
        from fedveil.audit.egress import EgressSettings, audit_model, audit_run

        settings = EgressSettings(
            images=images, shadows=shadows, companions=companions, epochs=epochs, seed=seed
        )
        if target.is_file():
            assert dataset is not None
            assert model is not None
            report = audit_model(target, dataset, model, settings, out=out)
        else:
            report = audit_run(target, settings, out=out)
    typer.echo(report.table())
    typer.echo(str(out / "egress.json"))


@audit.command("sums")
def audit_sums(
    run: Annotated[Path, typer.Argument(help="Directory of a run of --strategy analytic.")],
    out: Annotated[Path, typer.Option(help="Directory for sums.json and sums.png.")],
    images: Annotated[int, typer.Option(help="Images in the sums told from others.")] = 2_000,
    rebuilt: Annotated[int, typer.Option(help="Images that are rebuilt at most; 0: none.")] = 8,
    seed: Annotated[int, typer.Option(help="Seeds the images and the searches.")] = 0,
) -> None:
    """Tell what sums over clients' images give away: who is in them, and what can be rebuilt.

    Of the sums that the server held, and of one client's, as it would hold them without secure
    aggregation, of two releases that differ by one client, or with all others colluding. Writes
    sums.json and, where an image is alone in its class, sums.png.
    """
    with interruptible(NOTHING_WRITTEN):
        from fedveil.audit.sums import SumsSettings
        from fedveil.audit.sums import audit_sums as audited

        settings = SumsSettings(images=images, rebuilt=rebuilt, seed=seed)
        report = audited(run, settings, out=out)
    typer.echo(report.table())
    typer.echo(str(out / "sums.json"))


@audit.command("theft")
def audit_theft(
    run: Annotated[Path, typer.Option(help="Directory of a run of fedveil train.")],
    out: Annotated[Path, typer.Option(help="Directory for the results; resumed if there.")],
    labels: Annotated[
        str,
        typer.Option(help="Labelled images of a thief, from 0; several, with commas between."),
    ] = "0,10,50,100,600",
    colluders: Annotated[
        str, typer.Option(help="Clients that put their copies together; several, with commas.")
    ] = "1,2,5",
    thieves: Annotated[int, typer.Option(help="Draws of clients and images for each.")] = 3,
    workers: Annotated[int | None, typer.Option(help="Worker processes; one a core.")] = None,
    seed: Annotated[int, typer.Option(help="Seeds the draws of clients and images.")] = 0,
) -> None:
    """Steal the model as its clients could, and compare with training alone.

    Writes theft.json and theft.png. Interrupted, it goes on where it stopped.
    """
    with interruptible():
        from fedveil.audit.theft import TheftSettings, run_theft_audit

        settings = TheftSettings(
            run=run,
            labels=_numbers("--labels", labels),
            colluders=_numbers("--colluders", colluders),
            thieves=thieves,
            seed=seed,
        )
        report = run_theft_audit(settings, out=out, workers=workers)
    typer.echo(report.table())
    typer.echo(f"{out / 'theft.json'}  {out / 'theft.png'}")


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise FedveilError(
            f"{option} {text!r} is no list of whole numbers; write them like 10,50"
        ) from None
