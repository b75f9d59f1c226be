"""The studies: ``fedveil reproduce``, ``fedveil frontier`` and ``fedveil demo``."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fedveil.cli.interrupted import interruptible
from fedveil.cli.settings import with_settings
from fedveil.studies.settings import (
    DctOptions,
    FrontierOptions,
    NoiseOptions,
    TheftOptions,
    TraceOptions,
)

if TYPE_CHECKING:  # importing torch takes a second that --help need not wait
    from fedveil.studies.study import Study

reproduce = typer.Typer(help="Make the figures of the papers anew.", no_args_is_help=True)

_Out = Annotated[Path, typer.Option(help="Directory of the study; resumed if there.")]


@reproduce.command("noise")
@with_settings(NoiseOptions)
def reproduce_noise(*, out: _Out, **settings: Any) -> None:
    """Accuracy of w and of the copies over the rounds, for noise-pair and noise-delta.

    Writes noise.json, noise.png, noise-frontier.png and noise.md, and with --search
    noise-search.json and noise-search.md. Interrupted, it goes on where it stopped.
    """
    wanted = NoiseOptions(**settings)
    with interruptible():
        from fedveil.studies.noise import select
        from fedveil.studies.study import measure

        *earlier, study = select(wanted)
        for search in earlier:
            measure(search, out, on_piece=_show_piece)
        _measure(study, out)


@reproduce.command("dct")
@with_settings(DctOptions)
def reproduce_dct(*, out: _Out, **settings: Any) -> None:
    """Figure 3 of the paper, and leakage and accuracy against the coefficients kept.

    Writes dct.json, dct.png, dct.md and figure3.png. Interrupted, it goes on where it stopped.
    """
    with interruptible():
        from fedveil.studies.dct import DctStudy

        _measure(DctStudy(**settings), out)


@reproduce.command("trace")
@with_settings(TraceOptions)
def reproduce_trace(*, out: _Out, **settings: Any) -> None:
    """Who leaked: coalitions of 1 to 10 clients, what they do to hide, and innocent models.

    Writes trace.json, trace.png and trace.md. Interrupted, it keeps its training runs.
    """
    with interruptible():
        from fedveil.studies.trace import TraceStudy

        _measure(TraceStudy(**settings), out)


@reproduce.command("theft")
@with_settings(TheftOptions)
def reproduce_theft(*, out: _Out, **settings: Any) -> None:
    """Final accuracy against theft advantage, for every protection, on MNIST and CIFAR-10.

    Writes theft-study.json, theft-study.png and theft-study.md. Interrupted, it goes on where it
    stopped.
    """
    wanted = TheftOptions(**settings)
    with interruptible():
        from fedveil.studies.theft import THEFT, select

        _measure(select(THEFT, wanted), out)


@with_settings(FrontierOptions)
def frontier(
    *,
    out: _Out,
    workers: Annotated[int | None, typer.Option(help="Processes side by side; one a core.")] = None,
    **settings: Any,
) -> None:
    """Accuracy against leakage for every defence and strength, by the best attack of the suite.

    Writes frontier.json, frontier.png and frontier.md. Interrupted, it goes on where it stopped.
    """
    with interruptible():
        from fedveil.federation.engines.worker import usable_cores
        from fedveil.studies.frontier import FrontierStudy

        study = FrontierStudy(**settings)
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
