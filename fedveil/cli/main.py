"""The command line; each command checks its options, calls one function and prints the outcome."""

import os
import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from fedveil import __version__, interrupts
from fedveil.cli.deploy import deploy
from fedveil.cli.doctor import doctor
from fedveil.cli.key import deliver, key
from fedveil.cli.report import report
from fedveil.cli.settings import with_settings
from fedveil.cli.transform import transform
from fedveil.errors import FedveilError
from fedveil.files import UNFINISHED, check_directory
from fedveil.wording import quantity

if TYPE_CHECKING:  # importing torch takes a second that --help need not wait
    from fedveil.runs.directory import RunDirectory

app = typer.Typer(
    name="fedveil",
    help="Protects federated learning in both directions, and proves it by attack.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
reproduce = typer.Typer(help="Make the figures of the papers anew.", no_args_is_help=True)
audit = typer.Typer(help="Attack what a federation gives away, and measure.", no_args_is_help=True)
app.add_typer(reproduce, name="reproduce")
app.add_typer(audit, name="audit")
app.add_typer(deploy, name="deploy")
app.add_typer(key, name="key")


def main() -> None:
    """Run the command line; a mistake of the user ends in a sentence, never in a traceback."""
    # Before torch is loaded: threads that spin while they wait stall the server whenever another
    # process wants its core.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    interrupts.answer_sigterm()
    try:
        app()
    except FedveilError as error:
        Console(stderr=True, highlight=False, soft_wrap=True).print(
            f"fedveil: {error}", markup=False
        )
        sys.exit(2)


def _version(asked: bool) -> None:
    if asked:
        typer.echo(f"fedveil {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


@app.command()
@with_settings
def train(
    *,
    out: Annotated[
        Path | None, typer.Option(help="New directory for the run.", rich_help_panel="Output")
    ] = None,
    resume: Annotated[
        Path | None,
        typer.Option(help="Directory of a run to go on with.", rich_help_panel="Output"),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(help="TOML file with any of the options.", rich_help_panel="Output"),
    ] = None,
    noise_key: Annotated[
        Path | None,
        typer.Option(
            help="noise.key, or noise.key.enc, of an earlier run: its noise again.",
            rich_help_panel="Noise",
        ),
    ] = None,
    **settings: Any,
) -> None:
    """Train a model whose copies stay below an accuracy cap.

    The directory then holds model.safetensors (w, the clean model), rounds.jsonl, summary.json and
    curves.png, and all along what --resume needs. With FEDVEIL_KEY_FILE, the path of a key made by
    fedveil key make, models and keys in it are encrypted.
    """
    if (certificates := settings.get("root_certificates")) is not None:
        settings["root_certificates"] = str(Path(certificates).absolute())
    if (out is None) == (resume is None):
        raise FedveilError("give either --out DIR for a new run or --resume DIR to go on with one")
    if out:
        _finish_training(_new_run(out, config, noise_key, settings))
        return
    places = {"config": config, "noise_key": noise_key}
    given = {name: value for name, value in (places | settings).items() if value is not None}
    if others := [name for name in given if name != "rounds"]:
        names = ", ".join(f"--{name.replace('_', '-')}" for name in others)
        raise FedveilError(
            "--resume takes every setting but --rounds from the run itself; leave out " + names
        )
    if resume:
        _finish_training(_earlier_run(resume, settings.get("rounds")))


def _new_run(
    out: Path, config: Path | None, noise_key: Path | None, settings: dict[str, Any]
) -> "RunDirectory":
    from fedveil.data.load import absolute_name, remarks_on
    from fedveil.federation.server_app import outlook, prepare_job
    from fedveil.runs.config import TrainConfig
    from fedveil.runs.directory import RunDirectory
    from fedveil.runs.logs import check_log
    from fedveil.runs.secrets import read_noise_key
    from fedveil.sealing import OperatorKey

    checked = TrainConfig.read(config, **settings) if config else TrainConfig.check(settings)
    key = read_noise_key(noise_key) if noise_key else None
    OperatorKey.from_environment()
    check_log(checked.log)
    # From wherever the run is taken up again, it is the same folder of images.
    checked = checked.model_copy(update={"dataset": absolute_name(checked.dataset)})
    job = prepare_job(checked)  # so that a setting that does not fit leaves nothing behind
    for sentence in (outlook(job), *remarks_on(job.dataset.left_out, job.dataset.remarks)):
        typer.echo(f"{checked.dataset}: {sentence}", err=True)
    for note in job.notes:
        typer.echo(note, err=True)
    return RunDirectory.create(out, checked, noise_key=key)


def _earlier_run(path: Path, rounds: int | None) -> "RunDirectory":
    from fedveil.runs.directory import RunDirectory

    run = RunDirectory.open(path)
    # Before the configuration is believed: it names what is imported.
    run.secrets.check_writable()
    with run.locked():
        if rounds is not None:
            run.extend(rounds)
        changed = {} if run.complete else run.note_versions()
    for name, what in changed.items():
        typer.echo(
            f"{name}: the run was under {what}; the same bits as of a run under one version are "
            "not promised from here on",
            err=True,
        )
    return run


def _finish_training(directory: "RunDirectory") -> None:
    from fedveil.federation.server_app import kept_cap
    from fedveil.federation.training_run import run_to_completion

    try:
        summary = run_to_completion(directory)
    except KeyboardInterrupt:
        last = directory.checkpoint()
        rounds = last.round if last else 0
        Console(stderr=True, soft_wrap=True).print(
            f"\nInterrupted after round {rounds}; nothing is lost. Go on with\n"
            f"  fedveil train --resume {directory.path}"
        )
        raise typer.Exit(130) from None
    for warning in filter(None, (_of_no_use(summary), _collapsed(directory, summary))):
        typer.echo(warning, err=True)
    typer.echo(
        f"w{_of_round(summary)}: {summary['accuracy']:.2%} on "
        f"{quantity(summary['report_images'], 'image')} it never met"
    )
    typer.echo(_received(summary, kept_cap(directory.config)))
    if seen := _seen_of_clients(summary):
        typer.echo(seen, err=True)
    if traced := _traced(summary):
        typer.echo(traced, err=True)
    typer.echo(f"{directory.path / 'summary.json'}  {directory.path / 'curves.png'}")


def _received(summary: dict[str, Any], cap: float | None) -> str:
    if summary.get("sends") == "untrained":
        return "clients received nothing that was learnt"
    passed = ""
    if cap is not None:
        over, rounds = summary["rounds_over_cap"], summary["configuration"]["rounds"]
        passed = f" (cap {cap:.0%}, passed in {over} of {quantity(rounds, 'round')})"
    return f"best copy any client received: {summary['copies_max']:.2%}{passed}"


def _seen_of_clients(summary: dict[str, Any]) -> str | None:
    from fedveil.federation.server_app import ANSWERS_ALONE, SEEN_ALONE

    seen = (summary.get("analytic") or summary.get("answers") or {}).get("server_sees", "")
    for alone in (SEEN_ALONE, ANSWERS_ALONE):
        if seen.endswith(alone) and not summary["privacy"]:
            return (
                f"the server saw {alone}, which tell of its images; with --secure-aggregation it "
                "sees the sum of all clients only"
            )
    return None


def _traced(summary: dict[str, Any]) -> str | None:
    sums = summary.get("analytic") or {}
    share = sums.get("traceable")
    if share is None or share < _TRACED:
        return None
    return (
        f"whoever has the sums, and as many public images as they are of, is to be expected to "
        f"find {share:.0%} of the images in them where 1 % of others are; noise (--epsilon) "
        "prevents it, and fedveil audit sums tells what a server can do"
    )


_TRACED = 0.02  # twice what guessing finds


def _of_no_use(summary: dict[str, Any]) -> str | None:
    from fedveil.report.verdict import learnt_nothing

    chance, settings = summary.get("chance"), summary["configuration"]
    if chance is None or not learnt_nothing(summary["accuracy"], chance, summary["report_images"]):
        return None
    useless = f"w is of no use: naming the commonest class is right on {chance:.1%}. "
    if "analytic" in summary:
        return useless + (
            "The feature map does not suit the images, or they are too few: give --backbone "
            "efficientnet-lite0 for photographs, more --filters, or more images"
        )
    return useless + (
        "Training diverged or learnt nothing: lower --learning-rate "
        f"({settings['learning_rate']:g}), give --clip 1, or train more --rounds or --epochs"
    )


def _of_round(summary: dict[str, Any]) -> str:
    number, rounds = summary.get("round"), summary["configuration"]["rounds"]
    if number in (None, rounds):
        return ""
    return (
        f" of round {number} of {rounds}, the best on {summary['calibration_images']} calibration "
        "images"
    )


def _collapsed(directory: "RunDirectory", summary: dict[str, Any]) -> str | None:
    from fedveil.runs.directory import fallen_from

    rounds = directory.rounds()
    if (best := fallen_from(rounds)) is None:
        return None
    settings, last = summary["configuration"], rounds[-1]
    kept = summary.get("round", last.round)
    whose = f"w is kept from round {kept}"
    if kept == last.round:
        whose = "w is of that last round, and --deliver best would have kept a better one"
    return (
        f"Training collapsed: round {last.round} ends at {last.accuracy:.1%}, after "
        f"{best.accuracy:.1%} in round {best.round}; {whose}. For a run that holds, lower "
        f"--learning-rate ({settings['learning_rate']:g}), give --clip 1, fewer --epochs or a "
        "higher --fraction"
    )


@reproduce.command("noise")
def reproduce_noise(
    out: Annotated[Path, typer.Option(help="Directory of the study; resumed if there.")],
    seeds: Annotated[
        int, typer.Option(min=1, help="Seeds 0, 1, …: a run of each arm for each.")
    ] = 3,
    dataset: Annotated[
        str, typer.Option(help="What is reported on: NAME or a fold of it, NAME@k/n.")
    ] = "mnist@4+5/12",
    search_dataset: Annotated[
        str, typer.Option(help="What the settings are chosen on, with --search.")
    ] = "mnist@1+6/12",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of each run.")] = 50,
    arm: Annotated[
        list[str] | None,
        typer.Option(help="One of the study's strategies; may be repeated.  [default: all]"),
    ] = None,
    also_search: Annotated[
        bool, typer.Option("--search", help="Also run the settings that were tried on the way.")
    ] = False,
) -> None:
    """Accuracy of w and of the copies over the rounds, for noise-pair and noise-delta.

    Writes noise.json, noise.png, noise-frontier.png and noise.md, and with --search
    noise-search.json and noise-search.md. Interrupted, it goes on where it stopped.
    """
    from dataclasses import replace

    from fedveil.studies.noise import NOISE, SEARCH, search, select
    from fedveil.studies.noise import reproduce as run

    common = {**NOISE.common, "rounds": rounds}
    searched, reported = ({**common, "dataset": name} for name in (search_dataset, dataset))
    try:
        if also_search:
            search(replace(SEARCH, common=searched), out)
        run(replace(select(NOISE, arm), common=reported, seeds=tuple(range(seeds))), out)
    except KeyboardInterrupt:
        typer.echo("Interrupted; the same command goes on where it stopped.", err=True)
        raise typer.Exit(130) from None
    typer.echo((out / "noise.md").read_text())
    typer.echo(f"{out / 'noise.json'}  {out / 'noise.png'}")


@reproduce.command("dct")
def reproduce_dct(
    out: Annotated[Path, typer.Option(help="Directory of the study; resumed if there.")],
    images: Annotated[int, typer.Option(help="Images attacked for each keep.")] = 100,
    seeds: Annotated[int, typer.Option(help="Training runs for each keep: seeds 0, 1, …")] = 3,
    dataset: Annotated[
        str, typer.Option(help="What is attacked; losslessly stored images.")
    ] = "cifar100",
    accuracy_dataset: Annotated[str, typer.Option(help="What is learnt.")] = "cifar10",
    keep: Annotated[
        list[int] | None,
        typer.Option(help="Coefficients kept of 64; may be repeated.  [default: 1 to 64, eight]"),
    ] = None,
    figure_images: Annotated[int, typer.Option(help="Images of figure 3.")] = 4,
    figure_keep: Annotated[int, typer.Option(help="Coefficients kept in figure 3.")] = 6,
    rounds: Annotated[int, typer.Option(help="Rounds of each training run.")] = 20,
    epochs: Annotated[int, typer.Option(help="Local epochs a round.")] = 1,
) -> None:
    """Figure 3 of the paper, and leakage and accuracy against the coefficients kept.

    Writes dct.json, dct.png, dct.md and figure3.png. Interrupted, it goes on where it stopped.
    """
    try:
        from fedveil.studies.dct import KEEPS, DctStudy
        from fedveil.studies.dct import reproduce as run

        study = DctStudy(
            images=images,
            seeds=seeds,
            dataset=dataset,
            accuracy_dataset=accuracy_dataset,
            keeps=tuple(keep or KEEPS),
            figure_images=figure_images,
            figure_keep=figure_keep,
            rounds=rounds,
            epochs=epochs,
        )
        run(study, out, on_piece=_show_piece)
    except KeyboardInterrupt:
        typer.echo("Interrupted; the same command goes on where it stopped.", err=True)
        raise typer.Exit(130) from None
    typer.echo((out / "dct.md").read_text())
    typer.echo(f"{out / 'dct.json'}  {out / 'dct.png'}  {out / 'figure3.png'}")


@reproduce.command("trace")
def reproduce_trace(
    out: Annotated[Path, typer.Option(help="Directory of the study; its runs are resumed.")],
    dataset: Annotated[str, typer.Option(help="mnist, or digits for a quick look.")] = "mnist",
    rounds: Annotated[int, typer.Option(min=1, help="Rounds of the run that is leaked.")] = 50,
    trials: Annotated[int, typer.Option(min=1, help="Leaks of each kind.")] = 3,
    innocents: Annotated[int, typer.Option(min=5, help="Innocent models traced.")] = 1_000,
    fingerprint: Annotated[
        float | None, typer.Option(help="Strength of the fingerprints, as of fedveil train.")
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Worker processes; one a core.")] = None,
) -> None:
    """Who leaked: coalitions of 1 to 10 clients, what they do to hide, and innocent models.

    Writes trace.json, trace.png and trace.md. Interrupted, it keeps its training runs.
    """
    try:
        from fedveil.studies.trace import TraceStudy
        from fedveil.studies.trace import reproduce as run

        study = TraceStudy(
            dataset=dataset,
            rounds=rounds,
            other_rounds=min(rounds, 20),
            trials=trials,
            innocents=innocents,
            strength=fingerprint,
            workers=workers,
        )
        run(study, out, on_piece=_show_piece)
    except KeyboardInterrupt:
        typer.echo("Interrupted; the same command goes on where it stopped.", err=True)
        raise typer.Exit(130) from None
    typer.echo((out / "trace.md").read_text())
    typer.echo(f"{out / 'trace.json'}  {out / 'trace.png'}")


@reproduce.command("theft")
def reproduce_theft(
    out: Annotated[Path, typer.Option(help="Directory of the study; resumed if there.")],
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each protection: seeds 0, 1, …")] = 3,
    dataset: Annotated[
        list[str] | None,
        typer.Option(help="One of the study's; may be repeated.  [default: all]"),
    ] = None,
    arm: Annotated[
        list[str] | None,
        typer.Option(help="One of the study's protections; may be repeated.  [default: all]"),
    ] = None,
    partition: Annotated[
        list[str] | None,
        typer.Option(help="iid or shards:2; may be repeated.  [default: both]"),
    ] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Rounds of each run, where not the study's.")
    ] = None,
    thieves: Annotated[int, typer.Option(min=1, help="Thieves of each run.")] = 1,
    colluders: Annotated[
        list[int] | None,
        typer.Option(min=1, help="How many collude; may be repeated.  [default: 1, 2, 5]"),
    ] = None,
    workers: Annotated[int | None, typer.Option(help="Worker processes of the audits.")] = None,
) -> None:
    """Final accuracy against theft advantage, for every protection, on MNIST and CIFAR-10.

    Writes theft-study.json, theft-study.png and theft-study.md. Interrupted, it goes on where it
    stopped.
    """
    try:
        from fedveil.studies.theft import THEFT, select
        from fedveil.studies.theft import reproduce as run

        study = select(
            THEFT,
            datasets=dataset,
            partitions=partition,
            arms=arm,
            rounds=rounds,
            seeds=tuple(range(seeds)),
            thieves=thieves,
            colluders=tuple(colluders) if colluders else None,
        )
        run(study, out, workers=workers, on_piece=_show_piece)
    except KeyboardInterrupt:
        typer.echo("Interrupted; the same command goes on where it stopped.", err=True)
        raise typer.Exit(130) from None
    typer.echo((out / "theft-study.md").read_text())
    typer.echo(f"{out / 'theft-study.json'}  {out / 'theft-study.png'}")


def _show_piece(name: str, done: int, total: int) -> None:
    typer.echo(f"[{done + 1}/{total}] {name}", err=True)


class ClientReturns(StrEnum):
    """What a client returns in ``fedveil audit leakage``."""

    GRADIENT = "gradient"
    STEP = "step"
    FEDAVG = "fedavg"


def _local_rate(update: ClientReturns) -> float:
    # The longer the one step, the less the rounding of the weights hides; several must converge.
    return 0.05 if update is ClientReturns.FEDAVG else 1.0


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
            help="dlg, idlg, rgap, lm, ig, ig-bn, fc, peel or ica, with its options as in "
            "ig:steps=600,restarts=2; may be repeated."
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
        typer.Option(help="Of local steps.  [default: 1 for step, 0.05 for fedavg]"),
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
    try:
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
    except KeyboardInterrupt:
        kept = (out / UNFINISHED).is_dir()
        left = f"the same command goes on from what {out} has" if kept else "nothing was written"
        typer.echo(f"Interrupted; {left}.", err=True)
        raise typer.Exit(130) from None
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
    try:
        from fedveil.audit.trace import run_trace

        told = run_trace(leaked, run, alpha=alpha, out=out)
    except KeyboardInterrupt:
        typer.echo("Interrupted; nothing was written.", err=True)
        raise typer.Exit(130) from None
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
    try:
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
    except KeyboardInterrupt:
        typer.echo("Interrupted; nothing was written.", err=True)
        raise typer.Exit(130) from None
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
    try:
        from fedveil.audit.sums import SumsSettings
        from fedveil.audit.sums import audit_sums as audited

        settings = SumsSettings(images=images, rebuilt=rebuilt, seed=seed)
        report = audited(run, settings, out=out)
    except KeyboardInterrupt:
        typer.echo("Interrupted; nothing was written.", err=True)
        raise typer.Exit(130) from None
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
    try:
        from fedveil.audit.theft import TheftSettings, run_theft_audit

        settings = TheftSettings(
            run=run,
            labels=_numbers("--labels", labels),
            colluders=_numbers("--colluders", colluders),
            thieves=thieves,
            seed=seed,
        )
        report = run_theft_audit(settings, out=out, workers=workers)
    except KeyboardInterrupt:
        typer.echo("Interrupted; the same command goes on where it stopped.", err=True)
        raise typer.Exit(130) from None
    typer.echo(report.table())
    typer.echo(f"{out / 'theft.json'}  {out / 'theft.png'}")


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise FedveilError(
            f"{option} {text!r} is no list of whole numbers; write them like 10,50"
        ) from None


@app.command()
def frontier(
    out: Annotated[Path, typer.Option(help="Directory of the study; resumed if there.")],
    dataset: Annotated[str, typer.Option(help="What is learnt, and attacked.")] = "cifar10",
    leakage_dataset: Annotated[
        str | None,
        typer.Option(help="What is attacked in the worst case; the same by default."),
    ] = None,
    images: Annotated[int, typer.Option(help="Images attacked for each row.")] = 96,
    sum_images: Annotated[
        int | None,
        typer.Option(help="Images attacked under a sum.  [default: a batch of each client]"),
    ] = None,
    scenario: Annotated[
        list[str] | None,
        typer.Option(help="worst, round or sum; may be repeated.  [default: all]"),
    ] = None,
    seeds: Annotated[int, typer.Option(help="Training runs for each defence: 0, 1, …")] = 3,
    rounds: Annotated[int, typer.Option(help="Rounds of each training run.")] = 20,
    defense: Annotated[
        list[str] | None,
        typer.Option(help="As of audit leakage; may be repeated.  [default: all, 30 settings]"),
    ] = None,
    attack: Annotated[
        list[str] | None,
        typer.Option(help="Attacks of the worst case; may be repeated.  [default: lm, ig]"),
    ] = None,
    round_attack: Annotated[
        list[str] | None,
        typer.Option(help="Attacks of the realistic round; may be repeated.  [default: ig]"),
    ] = None,
    batch: Annotated[int, typer.Option(help="Images of the realistic round.")] = 16,
    inverse: Annotated[
        bool, typer.Option(help="Also learn, on test images, to undo transformations.")
    ] = True,
    workers: Annotated[int | None, typer.Option(help="Processes side by side; one a core.")] = None,
) -> None:
    """Accuracy against leakage for every defence and strength, by the best attack of the suite.

    Writes frontier.json, frontier.png and frontier.md. Interrupted, it goes on where it stopped.
    """
    try:
        from fedveil.federation.engines.worker import usable_cores
        from fedveil.studies.frontier import FrontierStudy, measure

        defaults = FrontierStudy()
        study = FrontierStudy(
            dataset=dataset,
            leakage_dataset=leakage_dataset,
            images=images,
            sum_images=sum_images,
            scenarios=tuple(scenario or defaults.scenarios),
            seeds=seeds,
            rounds=rounds,
            defenses=tuple(defense or defaults.defenses),
            worst_attacks=tuple(attack or defaults.worst_attacks),
            round_attacks=tuple(round_attack or defaults.round_attacks),
            batch=batch,
            inverse=inverse,
        )
        measure(
            study, out, workers=usable_cores() if workers is None else workers, on_piece=_show_piece
        )
    except KeyboardInterrupt:
        typer.echo("Interrupted; the same command goes on where it stopped.", err=True)
        raise typer.Exit(130) from None
    typer.echo((out / "frontier.md").read_text())
    typer.echo(f"{out / 'frontier.json'}  {out / 'frontier.png'}")


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Directory for pictures and summary.")] = Path("demo"),
) -> None:
    """Show both protections and the attack on them in three minutes, on built-in photographs."""
    from fedveil.studies.demo import run_demo

    typer.echo(run_demo(out))


app.command("doctor")(doctor)
app.command("transform")(transform)
app.command("report")(report)
app.command("deliver")(deliver)
