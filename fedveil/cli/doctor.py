"""``fedveil doctor``: what this machine and these images allow."""

from typing import Annotated

import typer

from fedveil.errors import FedveilError


def doctor(
    dataset: Annotated[
        str, typer.Option(help="What is to be learnt; as of fedveil train.")
    ] = "digits",
    clients: Annotated[int, typer.Option(min=1, help="Clients that share it.")] = 10,
    cap: Annotated[float, typer.Option(help="Accuracy copies are to stay below.")] = 0.6,
    seed: Annotated[int, typer.Option(min=0, help="As of a run.")] = 0,
) -> None:
    """Say what this machine, its libraries and your images allow, and what to do where they do not.

    Ends with status 1 where something is to be done.
    """
    from fedveil.doctor import examine

    if not 0 < cap < 1:
        raise FedveilError(f"--cap {cap:g} is out of range: give a fraction, 0.6 for 60 %")
    checks = examine(dataset, clients=clients, cap=cap, seed=seed)
    width = max(len(check.name) for check in checks)
    for check in checks:
        typer.echo(f"{'!' if check.advice else ' '} {check.name:{width}}  {check.found}")
        if check.advice:
            typer.echo(f"  {'':{width}}  → {check.advice}")
    if any(check.advice for check in checks):
        raise typer.Exit(1)
