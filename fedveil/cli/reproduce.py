"""The studies: ``fedveil reproduce``, ``fedveil frontier`` and ``fedveil demo``."""

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedveil.cli.interrupted import interruptible

if TYPE_CHECKING:  # importing torch takes a second that --help need not wait
    from fedveil.studies.study import Study

reproduce = typer.Typer(help="Make the figures of the papers anew.", no_args_is_help=True)

_Names = list[str] | None
_Out = Annotated[Path, typer.Option(help="Directory of the study; resumed if there.")]


def _several(told: str, default: str = "all", **limits: Any) -> Any:
    return typer.Option(help=f"{told}; may be repeated (default {default}).", **limits)


@reproduce.command("noise")
def reproduce_noise(
    out: _Out,
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
    arm: Annotated[_Names, _several("One of the study's strategies")] = None,
    also_search: Annotated[
        bool, typer.Option("--search", help="Also run the settings that were tried on the way.")
    ] = False,
) -> None:
    """Accuracy of w and of the copies over the rounds, for noise-pair and noise-delta.

    Writes noise.json, noise.png, noise-frontier.png and noise.md, and with --search
    noise-search.json and noise-search.md. Interrupted, it goes on where it stopped.
    """
    with interruptible():
        from fedveil.studies.noise import NOISE, SEARCH
        from fedveil.studies.study import measure

        common = {**NOISE.common, "rounds": rounds}
        searched, reported = ({**common, "dataset": name} for name in (search_dataset, dataset))
        if also_search:
            measure(replace(SEARCH, common=searched), out, on_piece=_show_piece)
        study = replace(NOISE.of(arm), common=reported, seeds=tuple(range(seeds)))
        _measure(study, out)


@reproduce.command("dct")
def reproduce_dct(
    out: _Out,
    images: Annotated[int, typer.Option(help="Images attacked for each keep.")] = 100,
    seeds: Annotated[int, typer.Option(help="Training runs for each keep: seeds 0, 1, …")] = 3,
    dataset: Annotated[
        str, typer.Option(help="What is attacked; losslessly stored images.")
    ] = "cifar100",
    accuracy_dataset: Annotated[str, typer.Option(help="What is learnt.")] = "cifar10",
    keep: Annotated[list[int] | None, _several("Coefficients kept of 64", "1 to 64, eight")] = None,
    figure_images: Annotated[int, typer.Option(help="Images of figure 3.")] = 4,
    figure_keep: Annotated[int, typer.Option(help="Coefficients kept in figure 3.")] = 6,
    rounds: Annotated[int, typer.Option(help="Rounds of each training run.")] = 20,
    epochs: Annotated[int, typer.Option(help="Local epochs a round.")] = 1,
) -> None:
    """Figure 3 of the paper, and leakage and accuracy against the coefficients kept.

    Writes dct.json, dct.png, dct.md and figure3.png. Interrupted, it goes on where it stopped.
    """
    with interruptible():
        from fedveil.studies.dct import KEEPS, DctStudy

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
        _measure(study, out)


@reproduce.command("trace")
def reproduce_trace(
    out: _Out,
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
    with interruptible():
        from fedveil.studies.trace import TraceStudy

        study = TraceStudy(
            dataset=dataset,
            rounds=rounds,
            other_rounds=min(rounds, 20),
            trials=trials,
            innocents=innocents,
            strength=fingerprint,
            workers=workers,
        )
        _measure(study, out)


@reproduce.command("theft")
def reproduce_theft(
    out: _Out,
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each protection: seeds 0, 1, …")] = 3,
    dataset: Annotated[_Names, _several("One of the study's")] = None,
    arm: Annotated[_Names, _several("One of the study's protections")] = None,
    partition: Annotated[_Names, _several("iid or shards:2", "both")] = None,
    rounds: Annotated[
        int | None, typer.Option(min=1, help="Rounds of each run, where not the study's.")
    ] = None,
    thieves: Annotated[int, typer.Option(min=1, help="Thieves of each run.")] = 1,
    colluders: Annotated[list[int] | None, _several("How many collude", "1, 2, 5", min=1)] = None,
    workers: Annotated[int | None, typer.Option(help="Worker processes of the audits.")] = None,
) -> None:
    """Final accuracy against theft advantage, for every protection, on MNIST and CIFAR-10.

    Writes theft-study.json, theft-study.png and theft-study.md. Interrupted, it goes on where it
    stopped.
    """
    with interruptible():
        from fedveil.studies.theft import THEFT, select

        study = select(
            THEFT,
            datasets=dataset,
            partitions=partition,
            arms=arm,
            rounds=rounds,
            seeds=tuple(range(seeds)),
            thieves=thieves,
            colluders=tuple(colluders) if colluders else None,
            workers=workers,
        )
        _measure(study, out)


def frontier(
    out: _Out,
    dataset: Annotated[str, typer.Option(help="What is learnt, and attacked.")] = "cifar10",
    leakage_dataset: Annotated[
        str | None,
        typer.Option(help="What is attacked in the worst case; the same by default."),
    ] = None,
    images: Annotated[int, typer.Option(help="Images attacked for each row.")] = 96,
    sum_images: Annotated[
        int | None,
        typer.Option(help="Images attacked under a sum (default a batch of each client)."),
    ] = None,
    scenario: Annotated[_Names, _several("worst, round or sum")] = None,
    seeds: Annotated[int, typer.Option(help="Training runs for each defence: 0, 1, …")] = 3,
    rounds: Annotated[int, typer.Option(help="Rounds of each training run.")] = 20,
    defense: Annotated[_Names, _several("As of audit leakage", "all, 30 settings")] = None,
    attack: Annotated[_Names, _several("Attacks of the worst case", "lm, ig")] = None,
    round_attack: Annotated[_Names, _several("Attacks of the realistic round", "ig")] = None,
    batch: Annotated[int, typer.Option(help="Images of the realistic round.")] = 16,
    inverse: Annotated[
        bool, typer.Option(help="Also learn, on test images, to undo transformations.")
    ] = True,
    workers: Annotated[int | None, typer.Option(help="Processes side by side; one a core.")] = None,
) -> None:
    """Accuracy against leakage for every defence and strength, by the best attack of the suite.

    Writes frontier.json, frontier.png and frontier.md. Interrupted, it goes on where it stopped.
    """
    with interruptible():
        from fedveil.federation.engines.worker import usable_cores
        from fedveil.studies.frontier import FrontierStudy

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
        _measure(study, out, workers=usable_cores() if workers is None else workers)


def demo(
    out: Annotated[Path, typer.Option(help="Directory for pictures and summary.")] = Path("demo"),
) -> None:
    """Show both protections and the attack on them in three minutes, on built-in photographs."""
    from fedveil.studies.demo import run_demo

    typer.echo(run_demo(out))


def _measure(study: "Study", out: Path, *, workers: int | None = None) -> None:
    from fedveil.studies.study import measure

    measure(study, out, workers=workers, on_piece=_show_piece)
    typer.echo((out / f"{study.name}.md").read_text())
    pictures = sorted(out.glob("*.png"))
    typer.echo("  ".join(map(str, (out / f"{study.name}.json", *pictures))))


def _show_piece(name: str, done: int, total: int) -> None:
    typer.echo(f"[{done + 1}/{total}] {name}", err=True)
