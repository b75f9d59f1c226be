"""``fedveil deploy``: a federation over several hosts."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from fedveil.errors import FedveilError

deploy = typer.Typer(help="Run a federation over several hosts.", no_args_is_help=True)

_Directory = Annotated[Path, typer.Argument(help="Folder made by fedveil deploy init.")]


@deploy.command()
def init(
    directory: Annotated[Path, typer.Argument(help="New folder for the deployment.")],
    nodes: Annotated[int, typer.Option(min=1, max=10_000, help="How many nodes.")],
    host: Annotated[
        str, typer.Option(help="Name or address the nodes reach this server under.")
    ] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=1, max=60_000, help="Port for the nodes; the next two are used too.")
    ] = 9092,
    policy: Annotated[
        Path | None,
        typer.Option(help="TOML file: what the sites let be done with their images."),
    ] = None,
) -> None:
    """Write certificates, keys, start scripts, systemd units and a README with every command."""
    from fedveil.deployment.layout import Deployment, create

    create(directory, Deployment(host, port, nodes), policy=policy)
    typer.echo(f"{directory / 'README.md'}")


@deploy.command()
def register(directory: _Directory) -> None:
    """Make the nodes' keys known to the running SuperLink."""
    from fedveil.deployment.control import register as run

    for name, number in run(directory).items():
        typer.echo(f"{name}  {number}")


@deploy.command()
def status(directory: _Directory) -> None:
    """Say what runs and which nodes are there; exit status 1 where a part or a node is missing."""
    from fedveil.deployment.control import status as ask

    found = ask(directory)
    console = Console(soft_wrap=True, highlight=False)
    for part, up in found.parts.items():
        console.print(f"{'up  ' if up else 'DOWN'}  {part}")
    nodes = Table("node", "Flower's number", "status", box=None)
    for node in found.nodes:
        nodes.add_row(node.name, str(node.number or "-"), node.status)
    runs = Table("run", "app", "status", "why", box=None)
    for run in found.runs:
        runs.add_row(str(run.number), run.app, run.status, run.details)
    console.print(nodes)
    console.print(runs)
    for node in found.nodes:
        if node.refused:
            console.print(f"{node.name} refused, {node.refused}", markup=False)
    if not all(found.parts.values()) or any(node.status != "online" for node in found.nodes):
        raise typer.Exit(1)


@deploy.command()
def sign(
    directory: _Directory,
    app: Annotated[Path, typer.Argument(help="Folder of a Flower app.")],
    key: Annotated[
        Path | None, typer.Option(help="Signing key; signing.key of the deployment if not given.")
    ] = None,
) -> None:
    """Sign a Flower app, so that the deployment's nodes run it; prints what to call it."""
    from fedveil.deployment.layout import Deployment
    from fedveil.deployment.signed_apps import sign_app

    Deployment.open(directory)
    if not (app / "pyproject.toml").is_file():
        raise FedveilError(f"{app} is no Flower app: it has no pyproject.toml")
    signed = sign_app(app, key=key or directory / "signing.key", shelf=directory / "signed-apps")
    typer.echo(signed.spec)


@deploy.command()
def gate(directory: _Directory) -> None:
    """Serve the one port that is open to the nodes; start-gate runs this."""
    from fedveil.deployment.admission import Refusals, Register
    from fedveil.deployment.gate import Gate, serve
    from fedveil.deployment.layout import Deployment

    deployment = Deployment.open(directory)
    serve(
        Gate(
            deployment.superlink,
            authority=directory / "ca.crt",
            register=Register(directory),
            refusals=Refusals(directory),
        ),
        host=deployment.listen,
        port=deployment.port,
        certificate=directory / "server.crt",
        key=directory / "server.key",
    )


@deploy.command()
def shelf(directory: _Directory) -> None:
    """Serve the signed apps to the SuperLink, on loopback; start-shelf runs this."""
    from fedveil.deployment.layout import Deployment
    from fedveil.deployment.signed_apps import Shelf

    deployment = Deployment.open(directory)
    try:
        Shelf(directory / "signed-apps", deployment.shelf_port).serve_forever()
    except OSError as error:
        raise FedveilError(f"127.0.0.1:{deployment.shelf_port}: {error.strerror}") from None
    except KeyboardInterrupt:
        raise typer.Exit(0) from None


@deploy.command()
def images(
    node: Annotated[Path, typer.Argument(help="Folder of a node.")],
    source: Annotated[Path, typer.Argument(help="Its images.")],
) -> None:
    """Pass a node's images through its policy; prints where apps find them. start runs this."""
    from fedveil.deployment.site_images import admitted_images

    error = Console(stderr=True, soft_wrap=True, highlight=False)
    typer.echo(admitted_images(node, source, tell=lambda line: error.print(line, markup=False)))


@deploy.command()
def ledger(node: Annotated[Path, typer.Argument(help="Folder of a node.")]) -> None:
    """Say what a node's updates have spent of its images' privacy, in all runs together."""
    from fedveil.deployment.clientapp import LEDGER
    from fedveil.deployment.ledger import Ledger
    from fedveil.deployment.policy import POLICY, Policy

    policy, kept = Policy.read(node / POLICY), Ledger(node / LEDGER)
    runs = Table("run", "answers", "steps", box=None)
    releases = kept.releases()
    for run in dict.fromkeys(release.run for release in releases):
        of_run = [release for release in releases if release.run == run]
        runs.add_row(str(run), str(len(of_run)), str(sum(release.steps for release in of_run)))
    console = Console(soft_wrap=True, highlight=False)
    console.print(runs)
    most = "no limit" if policy.epsilon is None else f"{policy.epsilon:g}"
    spent = kept.spent(policy.delta)
    console.print(f"epsilon {spent:.2f} of {most} is spent (delta {policy.delta:g})")
