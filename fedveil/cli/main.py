"""The command line; each command checks its options, calls one function and prints the outcome."""

import os
import sys
from typing import Annotated

import typer
from rich.console import Console

from fedveil import __version__, interrupts
from fedveil.cli.audit import audit
from fedveil.cli.deploy import deploy
from fedveil.cli.doctor import doctor
from fedveil.cli.key import deliver, key
from fedveil.cli.report import report
from fedveil.cli.reproduce import demo, frontier, reproduce
from fedveil.cli.train import train
from fedveil.cli.transform import transform
from fedveil.errors import FedveilError

app = typer.Typer(
    name="fedveil",
    help="Protects federated learning in both directions, and proves it by attack.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
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


app.command("train")(train)
app.command("frontier")(frontier)
app.command("demo")(demo)
app.command("doctor")(doctor)
app.command("transform")(transform)
app.command("report")(report)
app.command("deliver")(deliver)
