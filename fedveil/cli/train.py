"""``fedveil train``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from fedveil.cli.settings import with_settings
from fedveil.errors import FedveilError
from fedveil.runs.config import TrainConfig
from fedveil.wording import quantity

if TYPE_CHECKING:  # importing torch takes a second that --help need not wait
    from fedveil.runs.directory import RunDirectory


@with_settings(TrainConfig)
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
    warnings = (
        _of_no_use(summary),
        _untested(summary),
        _collapsed(directory, summary),
        _adds_nothing(summary),
    )
    for warning in filter(None, warnings):
        typer.echo(warning, err=True)
    typer.echo(
        f"w{_of_round(summary)}: {summary['accuracy']:.2%} on "
        f"{quantity(summary['report_images'], 'image')} {_met(summary)}"
    )
    if alone := summary.get("server_alone"):
        typer.echo(_beside(alone))
    if taught := _distilled(summary):
        typer.echo(taught)
    typer.echo(_received(summary, kept_cap(directory.config)))
    if seen := _seen_of_clients(summary):
        typer.echo(seen, err=True)
    for told in filter(None, (_balance(summary), _traced(summary))):
        typer.echo(told, err=True)
    typer.echo(f"{directory.path / 'summary.json'}  {directory.path / 'curves.png'}")


def _met(summary: dict[str, Any]) -> str:
    doubles = summary.get("report_doubles", 0)
    if not doubles:
        return "it never met"
    return (
        f"of which {doubles:,} {'is a double' if doubles == 1 else 'are doubles'} of training "
        "images: what it is right on elsewhere may be less"
    )


def _beside(alone: dict[str, Any]) -> str:
    gain, low, high = (100 * alone[name] for name in ("gain", "gain_low", "gain_high"))
    return (
        f"the server's own {quantity(alone['images'], 'labelled image')} alone: "
        f"{alone['accuracy']:.2%}; clients add {gain:+.1f} points [{low:+.1f}, {high:+.1f}]"
    )


def _adds_nothing(summary: dict[str, Any]) -> str | None:
    alone = summary.get("server_alone")
    if alone is None or alone["gain_low"] > 0:
        return None
    advice = "ask more clients, or clients with more images"
    if summary["configuration"]["epsilon"] is not None:
        advice += ", or give a larger --epsilon"
    return (
        "Clients add nothing that can be told from chance: w is what the server's own labelled "
        f"images give alone. Deliver what these give, and ask nobody; or {advice}"
    )


def _balance(summary: dict[str, Any]) -> str | None:
    found = (summary.get("analytic") or {}).get("balanced")
    if found is None or found["gain_low"] <= 0:
        return None
    return (
        f"with --balanced w would be right on {100 * found['gain']:.1f} points more of the "
        "server's own labelled images: classes are many, or some have few images"
    )


def _distilled(summary: dict[str, Any]) -> str | None:
    found = (summary.get("analytic") or {}).get("distilled")
    if found is None:
        return None
    return (
        f"{found['model']}, taught by w on {quantity(found['images'], 'image')}: "
        f"{found['accuracy']:.2%} on the images w was asked (distilled.safetensors)"
    )


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


_NAMED = 5  # classes that are untested
_TRACED = 0.02  # twice what guessing finds


def _untested(summary: dict[str, Any]) -> str | None:
    names = summary.get("untested")
    if not names:
        return None
    others = f" and {len(names) - _NAMED} others" if len(names) > _NAMED else ""
    return (
        f"No report image is of {', '.join(names[:_NAMED])}{others}: no accuracy here tells how w "
        "does on what is trained on there; add test images of it, or set fewer aside to calibrate"
    )


def _of_no_use(summary: dict[str, Any]) -> str | None:
    from fedveil.results import learnt_nothing

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
