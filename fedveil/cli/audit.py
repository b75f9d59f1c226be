"""``fedveil audit``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedveil.audit.settings import (
    EgressSettings,
    LeakageSettings,
    SumsSettings,
    TheftSettings,
    TraceSettings,
)
from fedveil.cli.interrupted import NOTHING_WRITTEN, interruptible
from fedveil.cli.settings import with_settings
from fedveil.errors import FedveilError
from fedveil.files import UNFINISHED, check_directory

if TYPE_CHECKING:  # importing torch takes a second that --help need not wait
    from fedveil.audit.recorded import Recorded

audit = typer.Typer(help="Attack what a federation gives away, and measure.", no_args_is_help=True)


def _left_of(out: Path) -> str:
    kept = (out / UNFINISHED).is_dir()
    return f"the same command goes on from what {out} has" if kept else NOTHING_WRITTEN


@audit.command("leakage")
@with_settings(LeakageSettings)
def audit_leakage(
    *,
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
    **settings: Any,
) -> None:
    """Reconstruct a client's images from what the server receives, and score the result.

    Of a recording (--recorded, or --before and --after) --images and --batch follow from it,
    --victim counts the clients recorded, and --update, --epochs, --batch-size and --learning-rate
    say how the app trained: step for one step on all images, fedavg for more.

    Writes leakage.json, reconstructions.png and reconstructions.npz.
    """
    check_directory(out, new=not (out / UNFINISHED).is_dir())
    with interruptible(lambda: _left_of(out)):
        asked = LeakageSettings(**settings)
        from fedveil.audit.leakage import run_leakage_audit
        from fedveil.audit.recorded import run_recorded_audit
        from fedveil.memory import keep_freed_memory

        where = _recording(recorded, before, after, truth, checkpoint)
        keep_freed_memory()
        if where:
            report = run_recorded_audit(dataset, model, asked, where, out=out)
        else:
            report = run_leakage_audit(dataset, model, asked, checkpoint=checkpoint, out=out)
    typer.echo(report.table())
    typer.echo(f"{out / 'leakage.json'}  {out / 'reconstructions.png'}")


def _recording(
    recorded: Path | None,
    before: Path | None,
    after: Path | None,
    truth: Path | None,
    checkpoint: Path | None,
) -> "Recorded | None":
    from fedveil.audit.recorded import Recorded

    if not any((recorded, before, after)):
        if truth:
            raise FedveilError("--truth is for --recorded, or --before and --after: leave it out")
        return None
    if checkpoint:
        raise FedveilError("--checkpoint is in the recording already: leave it out")
    return Recorded(recorded, before, after, truth)


@audit.command("trace")
@with_settings(TraceSettings)
def audit_trace(
    *,
    leaked: Annotated[Path, typer.Argument(help="The leaked model: .safetensors, or .pt.")],
    run: Annotated[Path, typer.Option(help="Directory of the run it may have come from.")],
    out: Annotated[Path | None, typer.Option(help="JSON file for the result.")] = None,
    **settings: Any,
) -> None:
    """Name the clients a leaked model came from, by the fingerprints in their copies."""
    asked = TraceSettings(**settings)
    with interruptible(NOTHING_WRITTEN):
        from fedveil.audit.trace import run_trace

        told = run_trace(leaked, run, asked, out=out)
    typer.echo(told)


@audit.command("egress")
@with_settings(EgressSettings)
def audit_egress(
    *,
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
    **settings: Any,
) -> None:
    """Tell what a model that is about to leave gives away of who was in its training.

    Membership by loss, likelihood ratio and RMIA; AUC, members found at false-positive rates of 1 %
    and 0.1 %, and the images that are most exposed. Writes egress.json.
    """
    asked = EgressSettings(**settings)
    if target.is_file() and (dataset is None or model is None):
        raise FedveilError(
            f"{target} is a file of weights: give the --dataset it was trained on and its --model"
        )
    with interruptible(NOTHING_WRITTEN):
        from fedveil.audit.egress import audit_model, audit_run

        if target.is_file():
            assert dataset is not None
            assert model is not None
            report = audit_model(target, dataset, model, asked, out=out)
        else:
            report = audit_run(target, asked, out=out)
    typer.echo(report.table())
    typer.echo(str(out / "egress.json"))


@audit.command("sums")
@with_settings(SumsSettings)
def audit_sums(
    *,
    run: Annotated[Path, typer.Argument(help="Directory of a run of --strategy analytic.")],
    out: Annotated[Path, typer.Option(help="Directory for sums.json and sums.png.")],
    **settings: Any,
) -> None:
    """Tell what sums over clients' images give away: who is in them, and what can be rebuilt.

    Of the sums that the server held, and of one client's, as it would hold them without secure
    aggregation, of two releases that differ by one client, or with all others colluding. Writes
    sums.json and, where an image is alone in its class, sums.png.
    """
    asked = SumsSettings(**settings)
    with interruptible(NOTHING_WRITTEN):
        from fedveil.audit.sums import audit_sums as audited

        report = audited(run, asked, out=out)
    typer.echo(report.table())
    typer.echo(str(out / "sums.json"))


@audit.command("theft")
@with_settings(TheftSettings)
def audit_theft(
    *,
    run: Annotated[Path, typer.Option(help="Directory of a run of fedveil train.")],
    out: Annotated[Path, typer.Option(help="Directory for the results; resumed if there.")],
    workers: Annotated[int | None, typer.Option(help="Worker processes; one a core.")] = None,
    **settings: Any,
) -> None:
    """Steal the model as its clients could, and compare with training alone.

    Writes theft.json and theft.png. Interrupted, it goes on where it stopped.
    """
    asked = TheftSettings(run=run, **settings)
    with interruptible():
        from fedveil.audit.theft import run_theft_audit

        report = run_theft_audit(asked, out=out, workers=workers)
    typer.echo(report.table())
    typer.echo(f"{out / 'theft.json'}  {out / 'theft.png'}")
