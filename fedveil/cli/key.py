"""``fedveil key`` and ``fedveil deliver``: the operator's key, and w in the clear."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fedveil.errors import FedveilError

if TYPE_CHECKING:
    from fedveil.sealing import OperatorKey

key = typer.Typer(
    help="The key that runs are encrypted under; FEDVEIL_KEY_FILE is the path of its file.",
    no_args_is_help=True,
)

_Runs = Annotated[list[Path], typer.Argument(help="Directories of runs.", metavar="DIR...")]


@key.command()
def make(file: Annotated[Path, typer.Argument(help="New file for the key.")]) -> None:
    """Draw a key; the file is readable by you alone."""
    from fedveil.sealing import KEY_FILE, OperatorKey

    OperatorKey.make(file)
    typer.echo(f"export {KEY_FILE}={file.absolute()}")


@key.command()
def seal(directories: _Runs) -> None:
    """Encrypt runs that were started without a key; none of them may be training."""
    from fedveil.runs.directory import RunDirectory

    operator = _operator()
    for directory in directories:
        run = RunDirectory.open(directory)
        with run.locked():
            taken = run.secrets.seal(operator)
        typer.echo(f"{directory}: {', '.join(taken) or 'nothing'} taken in, as it lay there")


@key.command()
def rotate(
    directories: _Runs,
    old: Annotated[Path, typer.Option("--from", help="File of the key they are under now.")],
) -> None:
    """Put the key of FEDVEIL_KEY_FILE in the place of another one."""
    from fedveil.runs.directory import RunDirectory
    from fedveil.sealing import OperatorKey

    operator, before = _operator(), OperatorKey.read(old, option="--from")
    for directory in directories:
        if not (directory / "config.json").is_file():
            RunDirectory.open(directory)
        run = RunDirectory(directory)  # not opened: it is under the other key still
        with run.locked():
            run.secrets.rotate(before, operator)
        typer.echo(f"{directory}")


def deliver(
    directory: Annotated[Path, typer.Argument(help="Directory of a complete run.")],
    out: Annotated[Path, typer.Option(help="File for w, in the safetensors format.")],
) -> None:
    """Write w in the clear, for the party that ordered it; the file is readable by you alone."""
    from safetensors.torch import save

    from fedveil.files import write_atomically
    from fedveil.runs.directory import RunDirectory

    weights = RunDirectory.open(directory).model()
    try:
        write_atomically(out, save(weights), mode=0o600)
    except OSError as error:
        raise FedveilError(f"--out {out}: {error.strerror}") from None
    typer.echo(str(out))


def _operator() -> "OperatorKey":
    from fedveil.sealing import KEY_FILE, OperatorKey

    operator = OperatorKey.from_environment()
    if operator is None:
        raise FedveilError(
            f"{KEY_FILE} is not set; export {KEY_FILE}=FILE, the path of a key made by fedveil "
            "key make FILE"
        )
    return operator
