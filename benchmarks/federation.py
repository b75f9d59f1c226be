"""What a round costs on each engine, beside plain loops, another framework and the floor.

The job is McMahan's: MNIST-sized images (random: speed does not depend on what they show), 100
clients of 600, his CNN of 1,663,370 parameters, batches of 10, one epoch, 10 clients a round, two
processes or threads.

Every contestant is a process of its own that waits for its turn; rounds go there and back (A B C,
C B A, ...), so that whatever else the machine does falls on all of them. Quote the ratios. `ray`
runs the same client code as `local`; `ray-plain` runs what a textbook would write.

    python benchmarks/federation.py compare --rounds 5 --out docs/results
    python benchmarks/federation.py grow --out docs/results

pfl joins where it is installed, also in another environment: --pfl-python PATH. It needs
``pip install pfl`` beside PyTorch; two ranks talk over gloo, so neither Horovod nor MPI is needed.
"""

import argparse
import json
import logging
import os
import platform
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

os.environ |= {
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
}

Round = Callable[[], object]

CLIENTS, IMAGES, CLASSES = 100, 600, 10
SHAPE = (1, 28, 28)
PROCESSES = 2
SEED = 0
# Multiply-adds of one image through the two convolutions and the two linear layers; backward takes
# twice as many, but for the first layer, whose input needs no gradient.
_LAYERS = (784 * 25 * 32, 196 * 800 * 64, 3136 * 512, 512 * 10)
FLOP_A_ROUND = 2 * (3 * sum(_LAYERS) - _LAYERS[0]) * IMAGES * 10


@dataclass(frozen=True)
class Entry:
    """One contestant: who computes, and how large the federation is."""

    name: str
    registered: int = CLIENTS
    cohort: int = 10
    parameters: int = 0  # of the payload of idle clients; 0 is McMahan's CNN
    idle: bool = False

    @property
    def label(self) -> str:
        """Its name in tables."""
        return f"{self.name}-idle" if self.idle else self.name


# ---------------------------------------------------------------- the contestants' side


def client_images(client: int) -> Any:
    import torch

    from fedveil.data import Images

    generator = torch.Generator().manual_seed(SEED + client)
    raw = torch.randint(0, 256, (IMAGES, *SHAPE), generator=generator, dtype=torch.uint8)
    return Images(raw, torch.randint(0, CLASSES, (IMAGES,), generator=generator))


def fresh_model() -> Any:
    from fedveil.models import build_model

    return build_model("mnist-cnn", SHAPE, CLASSES, seed=SEED)


def client_app(*, plain: bool = False) -> Any:
    """The smallest client app that trains, with our local training or a textbook loop."""
    import torch
    from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
    from flwr.clientapp import ClientApp

    from fedveil.federation.training import LocalTraining, train_locally

    app = ClientApp()
    kept: dict[int | str, Any] = {}

    @app.query()
    def query(message: Message, context: Context) -> Message:
        return Message(RecordDict(), reply_to=message)

    @app.train("idle")
    def idle(message: Message, context: Context) -> Message:
        content = RecordDict(
            {
                "arrays": message.content["arrays"],
                "metrics": MetricRecord({"num-examples": IMAGES}),
            }
        )
        return Message(content, reply_to=message)

    @app.train()
    def train(message: Message, context: Context) -> Message:
        torch.set_num_threads(1)
        client = int(context.node_config["partition-id"])
        if "model" not in kept:
            kept["model"] = fresh_model()
        if client not in kept:
            kept[client] = client_images(client)
        model, images = kept["model"], kept[client]
        model.load_state_dict(message.content["arrays"].to_torch_state_dict())
        if plain:
            textbook_epoch(model, images)
        else:
            generator = torch.Generator().manual_seed(client)
            train_locally(model, images, LocalTraining(), generator=generator)
        metrics = MetricRecord({"num-examples": IMAGES})
        content = RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics})
        return Message(content, reply_to=message)

    return app


def federated_round(grid: Any, entry: Entry) -> Round:
    """Return one round of Flower's FedAvg on a grid, whichever it is."""
    import torch
    from flwr.app import ArrayRecord, ConfigRecord, Message, RecordDict
    from flwr.serverapp.strategy import FedAvg

    if entry.parameters:
        state = {str(i): torch.rand(entry.parameters // 4) for i in range(4)}
    else:
        state = fresh_model().state_dict()
    arrays = [ArrayRecord(state)]
    strategy = FedAvg(
        fraction_train=entry.cohort / entry.registered,
        min_train_nodes=entry.cohort,
        min_available_nodes=entry.cohort,
    )
    first = [Message(RecordDict(), next(iter(grid.get_node_ids())), "query")]
    assert not next(iter(grid.send_and_receive(first))).has_error()

    def one_round() -> None:
        messages = list(strategy.configure_train(1, arrays[0], ConfigRecord(), grid))
        for message in messages:
            message.metadata.message_type = "train.idle" if entry.idle else "train"
        replies = grid.send_and_receive(messages)
        assert len(list(replies)) == entry.cohort
        averaged, _ = strategy.aggregate_train(1, replies)
        assert averaged is not None
        arrays[0] = averaged

    return one_round


def run(entry: Entry, serve: Callable[[Round], None]) -> None:
    """Run the federation on the engine that ``entry`` names."""
    logging.getLogger("flwr").setLevel(logging.ERROR)
    if entry.name == "local":
        from fedveil.federation.engines.local import LocalGrid

        with LocalGrid(client_app(), nodes=entry.registered, workers=PROCESSES) as grid:
            serve(federated_round(grid, entry))
        return
    from flwr.serverapp import ServerApp
    from flwr.simulation import run_simulation

    server = ServerApp()

    @server.main()
    def main(grid: Any, context: Any) -> None:
        serve(federated_round(grid, entry))

    run_simulation(
        server,
        client_app(plain=entry.name == "ray-plain"),
        entry.registered,
        backend_config={
            "client_resources": {"num_cpus": 1, "num_gpus": 0.0},
            "init_args": {"num_cpus": PROCESSES, "logging_level": logging.ERROR},
        },
    )


def sequential(threads: int) -> Round:
    """What anybody would write first: no channels-last, torch's own SGD."""
    import torch

    torch.set_num_threads(threads)
    model, mean = fresh_model(), [p.detach().clone() for p in fresh_model().parameters()]
    images = [client_images(client) for client in range(10)]

    def one_round() -> None:
        nonlocal mean
        total = [torch.zeros_like(p) for p in mean]
        for own in images:
            with torch.no_grad():
                torch._foreach_copy_(list(model.parameters()), mean)
            textbook_epoch(model, own)
            with torch.no_grad():
                torch._foreach_add_(total, list(model.parameters()), alpha=0.1)
        mean = total

    return one_round


def two_processes(entry: Entry, serve: Callable[[Round], None]) -> None:
    """A loop written by hand for this job only: shared memory, no messages, five clients each."""
    import torch

    torch.set_num_threads(1)
    model = fresh_model()
    mean = torch.nn.utils.parameters_to_vector(model.parameters()).detach().share_memory_()
    totals = torch.zeros(PROCESSES, len(mean)).share_memory_()
    context = torch.multiprocessing.get_context("fork")
    pipes = [context.Pipe() for _ in range(PROCESSES)]

    def worker(rank: int) -> None:
        torch.set_num_threads(1)
        step = hand_written_epoch if entry.name == "two-processes" else best_epoch
        images = [client_images(client) for client in range(rank, 10, PROCESSES)]
        # The interesting end only: the parent's closing is the signal to stop.
        while pipes[rank][1].recv():
            totals[rank].zero_()
            for own in images:
                torch.nn.utils.vector_to_parameters(mean.clone(), model.parameters())
                model.to(memory_format=torch.channels_last)
                step(model, own)
                flat = torch.cat([p.detach().flatten() for p in model.parameters()])
                totals[rank].add_(flat, alpha=0.1)
            pipes[rank][1].send(True)

    workers = [context.Process(target=worker, args=(rank,), daemon=True) for rank in range(2)]
    for process in workers:
        process.start()

    def one_round() -> None:
        for ours, _ in pipes:
            ours.send(True)
        for ours, _ in pipes:
            ours.recv()
        mean.copy_(totals.sum(0))

    serve(one_round)
    for ours, _ in pipes:
        ours.send(False)


def textbook_epoch(model: Any, images: Any) -> None:
    import torch
    from torch.nn import functional as F

    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    for index in torch.randperm(IMAGES).split(10):
        optimiser.zero_grad()
        batch = images[index]
        F.cross_entropy(model(batch.pixels), batch.labels).backward()
        optimiser.step()


def hand_written_epoch(model: Any, images: Any) -> None:
    import torch
    from torch.nn import functional as F

    optimiser = torch.optim.SGD(model.parameters(), lr=0.05)
    for index in torch.randperm(IMAGES).split(10):
        batch = images[index]
        pixels = batch.pixels.contiguous(memory_format=torch.channels_last)
        optimiser.zero_grad()
        F.cross_entropy(model(pixels), batch.labels).backward()
        optimiser.step()


def best_epoch(model: Any, images: Any) -> None:
    import torch

    from fedveil.federation.training import LocalTraining, train_locally
    from fedveil.memory import keep_freed_memory

    keep_freed_memory()
    train_locally(model, images, LocalTraining(), generator=torch.Generator().manual_seed(0))


def floor(entry: Entry, serve: Callable[[Round], None]) -> None:
    """Only large matrix products, as many FLOP as the job has, half in each of two processes."""
    import torch

    size = 1024
    products = round(FLOP_A_ROUND / PROCESSES / (2 * size**3))
    context = torch.multiprocessing.get_context("fork")
    pipes = [context.Pipe() for _ in range(PROCESSES)]

    def worker(rank: int) -> None:
        torch.set_num_threads(1)
        left, right, out = torch.rand(3, size, size)
        while pipes[rank][1].recv():
            for _ in range(products):
                torch.mm(left, right, out=out)
            pipes[rank][1].send(True)

    for rank in range(PROCESSES):
        context.Process(target=worker, args=(rank,), daemon=True).start()

    def one_round() -> None:
        for ours, _ in pipes:
            ours.send(True)
        for ours, _ in pipes:
            ours.recv()

    serve(one_round)


def pfl(entry: Entry, serve: Callable[[Round], None]) -> None:
    """pfl-research with two ranks: its own algorithm, model wrapper, backend and all-reduce."""
    rank = int(os.environ.get("RANK", "0"))
    other = None
    if rank == 0:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = str(probe.getsockname()[1])
        os.environ |= {"TORCHELASTIC_RUN_ID": "benchmark", "WORLD_SIZE": "2", "RANK": "0"}
        os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "2", "GLOO_SOCKET_IFNAME": "lo"}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        other = subprocess.Popen(
            [sys.executable, *sys.argv],
            env=os.environ | {"RANK": "1", "LOCAL_RANK": "1"},
            stdin=subprocess.DEVNULL,
        )

    def leave() -> None:
        if other is not None:
            other.kill()
        os._exit(0)

    _pfl(rank, serve, leave)


def _pfl(rank: int, serve: Callable[[Round], None], leave: Round) -> None:
    import types

    import numpy as np
    import torch
    from pfl.aggregate.simulate import SimulatedBackend
    from pfl.algorithm.base import NNAlgorithmParams
    from pfl.algorithm.federated_averaging import FederatedAveraging
    from pfl.callback.base import TrainingProcessCallback
    from pfl.data.dataset import Dataset
    from pfl.data.federated_dataset import FederatedDataset
    from pfl.data.sampling import get_user_sampler
    from pfl.hyperparam import NNEvalHyperParams, NNTrainHyperParams
    from pfl.metrics import Metrics
    from pfl.model.pytorch import PyTorchModel
    from torch.nn import functional as F

    torch.set_num_threads(1)
    np.random.seed(SEED)
    model = fresh_model()
    model.loss = types.MethodType(lambda self, x, y: F.cross_entropy(self(x), y), model)
    model.metrics = types.MethodType(lambda self, x, y: {}, model)
    kept: dict[int, Any] = {}

    def dataset(client: int) -> Any:
        if client not in kept:
            images = client_images(client)
            kept[client] = (images.pixels, images.labels)
        return Dataset(raw_data=list(kept[client]))

    begin, done = threading.Semaphore(0), threading.Semaphore(0)

    class Turns(TrainingProcessCallback):  # type: ignore[misc]
        def on_train_begin(self, *, model: Any) -> Any:
            self.wait()
            return Metrics()

        def wait(self) -> None:
            # Both ranks: the other would otherwise do its half before the round is timed.
            if rank == 0:
                begin.acquire()
            torch.distributed.barrier()

        def after_central_iteration(
            self, metrics: Any, model: Any, *, central_iteration: int
        ) -> Any:
            if rank == 0:
                done.release()
            self.wait()
            return False, Metrics()

    data = FederatedDataset(dataset, get_user_sampler("random", list(range(CLIENTS))))

    def train() -> None:
        FederatedAveraging().run(
            algorithm_params=NNAlgorithmParams(
                central_num_iterations=10**6,
                evaluation_frequency=10**7,
                train_cohort_size=10,
                val_cohort_size=0,
            ),
            backend=SimulatedBackend(training_data=data, val_data=data),
            model=PyTorchModel(
                model,
                local_optimizer_create=torch.optim.SGD,
                central_optimizer=torch.optim.SGD(model.parameters(), 1.0),
            ),
            model_train_params=NNTrainHyperParams(
                local_num_epochs=1, local_learning_rate=0.05, local_batch_size=10
            ),
            model_eval_params=NNEvalHyperParams(local_batch_size=100),
            callbacks=[Turns()],
            send_metrics_to_platform=False,
        )

    def one_round() -> None:
        begin.release()
        done.acquire()

    def play() -> None:
        serve(one_round)
        leave()

    if rank == 0:  # pfl's event loop wants the main thread
        threading.Thread(target=play, daemon=True).start()
    train()


def serve_rounds(one_round: Round) -> None:
    print("@@ 0", flush=True)
    for _ in sys.stdin:
        start = time.perf_counter()
        one_round()
        print(f"@@ {time.perf_counter() - start}", flush=True)


def contest(entry: Entry) -> None:
    if entry.name in ("local", "ray", "ray-plain"):
        run(entry, serve_rounds)
    elif entry.name.startswith("sequential"):
        serve_rounds(sequential(int(entry.name[-1])))
    elif entry.name.startswith("two-processes"):
        two_processes(entry, serve_rounds)
    else:
        {"floor": floor, "pfl": pfl}[entry.name](entry, serve_rounds)


# ---------------------------------------------------------------- the table's side


def family(pid: int) -> set[int]:
    """A process and all its descendants."""
    found = {pid}
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        try:
            children = task.read_text().split()
        except OSError:
            continue
        for child in children:
            found |= family(int(child))
    return found


def memory(pid: int) -> float:
    """Proportional set size in MiB over a whole family: shared pages count once."""
    total = 0
    for member in family(pid):
        try:
            lines = Path(f"/proc/{member}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += next((int(line.split()[1]) for line in lines if line.startswith("Pss:")), 0)
    return total / 1024


def processor_seconds(pid: int) -> float:
    """Processor time of a whole family so far, which a busy machine stretches far less."""
    ticks = 0
    for member in family(pid):
        try:
            fields = Path(f"/proc/{member}/stat").read_text().rsplit(")", 1)[1].split()
        except OSError:
            continue
        ticks += int(fields[11]) + int(fields[12])
    return ticks / os.sysconf("SC_CLK_TCK")


class Contestant:
    """A process that plays a round when told to."""

    def __init__(self, entry: Entry, python: str) -> None:
        start = time.perf_counter()
        self.entry = entry
        self.peak = 0.0
        self.seconds: list[float] = []
        self.processor: list[float] = []
        self.process = subprocess.Popen(
            [python, __file__, "contestant", json.dumps(asdict(entry))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE if os.environ.get("QUIET", "1") == "1" else None,
            text=True,
            env=os.environ
            | {"PYTHONPATH": os.pathsep.join(["", *sys.path])}
            | ({"OMP_NUM_THREADS": "2"} if entry.name == "sequential-2" else {}),
        )
        threading.Thread(target=self._drain, daemon=True).start()
        self._answer()
        self.startup = time.perf_counter() - start

    def _drain(self) -> None:
        # A full pipe would stop the contestant.
        self.complaints = []
        for line in self.process.stderr or ():
            self.complaints = [*self.complaints[-20:], line]

    def _answer(self) -> float:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            if line.startswith("@@ "):
                return float(line[3:])
        raise RuntimeError(f"{self.entry.label} has ended:\n" + "".join(self.complaints))

    def play(self, *, counts: bool) -> float:
        """Let it run one round, which counts or is a warm-up; return the seconds it took."""
        assert self.process.stdin is not None
        before = processor_seconds(self.process.pid)
        over = threading.Event()
        watch = threading.Thread(target=self._watch, args=(over,))
        watch.start()
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        seconds = self._answer()
        over.set()
        watch.join()
        if counts:
            self.seconds.append(seconds)
            self.processor.append(processor_seconds(self.process.pid) - before)
        return seconds

    def _watch(self, over: threading.Event) -> None:
        while True:
            self.peak = max(self.peak, memory(self.process.pid))
            if over.wait(0.25):
                return

    def leave(self) -> None:
        """End it and whatever it has started."""
        assert self.process.stdin is not None
        members = family(self.process.pid)
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()
        for member in members - {self.process.pid}:
            try:
                os.kill(member, 9)
            except ProcessLookupError:
                continue

    def result(self) -> dict[str, Any]:
        """Everything measured about it."""
        return asdict(self.entry) | {
            "label": self.entry.label,
            "startup_seconds": self.startup,
            "round_seconds": self.seconds,
            "processor_seconds": self.processor,
            "median_processor_seconds": statistics.median(self.processor),
            "median_seconds": statistics.median(self.seconds),
            "peak_mib": self.peak,
        }


def has_pfl(python: str) -> bool:
    done = subprocess.run([python, "-c", "import pfl"], capture_output=True, check=False)
    return done.returncode == 0


def compare(rounds: int, python: str, skip: Sequence[str], out: Path) -> None:
    names = [
        "floor",
        "local",
        "ray",
        "ray-plain",
        "two-processes",
        "two-processes-best",
        "sequential-1",
    ]
    entries = [Entry(name) for name in [*names, "sequential-2"]]
    entries += [Entry("local", idle=True), Entry("ray", idle=True)]
    entries += [Entry("pfl")] if has_pfl(python) else []
    entries = [entry for entry in entries if entry.label not in skip]
    table = [
        Contestant(entry, python if entry.name == "pfl" else sys.executable) for entry in entries
    ]
    try:
        for turn in range(rounds + 1):
            # There and back, so that nobody always follows the same neighbour.
            for contestant in table if turn % 2 else table[::-1]:
                seconds = contestant.play(counts=turn > 0)
                print(f"{turn:3d} {contestant.entry.label:20s} {seconds:8.3f} s", flush=True)
    finally:
        for contestant in table:
            contestant.leave()
    results = [contestant.result() for contestant in table]
    absent = [] if has_pfl(python) else ["pfl: not installed; pip install pfl, or --pfl-python"]
    report = describe() | {"results": results, "ratios": ratios(table), "absent": absent}
    write(out / "federation-cost.json", report)
    draw_comparison(results, out / "federation-cost.png")
    for name, value in report["ratios"].items():
        print(f"{name:44s} {value:.2f}")


def ratios(table: Sequence[Contestant]) -> dict[str, float]:
    """Medians over the rounds of each round's own ratio, so that a slow minute cancels."""
    by_label = {contestant.entry.label: contestant for contestant in table}
    local = by_label["local"]
    found: dict[str, float] = {}
    for label, other in by_label.items():
        if label.endswith("idle"):
            found[f"{label}, seconds"] = statistics.median(other.seconds)
            found[f"{label}, processor seconds"] = statistics.median(other.processor)
        elif other is not local:
            found[f"local / {label}"] = _median_ratio(local.seconds, other.seconds)
            found[f"local / {label}, processor time"] = _median_ratio(
                local.processor, other.processor
            )
    return found


def _median_ratio(ours: Sequence[float], theirs: Sequence[float]) -> float:
    return statistics.median(a / b for a, b in zip(ours, theirs, strict=True))


GROWTH: dict[str, list[Entry]] = {
    "registered": [Entry("local", registered=n, idle=True) for n in (10, 100, 1_000, 10_000)],
    "cohort": [Entry("local", cohort=n, idle=True) for n in (10, 20, 50, 100)],
    "parameters": [Entry("local", parameters=n, idle=True) for n in (10**4, 10**5, 10**6, 10**7)],
}


def grow(rounds: int, with_ray: bool, out: Path) -> None:
    curves: dict[str, list[dict[str, Any]]] = {}
    for axis, entries in GROWTH.items():
        curves[axis] = []
        for entry in entries:
            pair = [entry, replace(entry, name="ray")] if with_ray else [entry]
            table = [Contestant(one, sys.executable) for one in pair]
            try:
                for turn in range(rounds + 1):
                    for contestant in table:
                        contestant.play(counts=turn > 0)
            finally:
                for contestant in table:
                    contestant.leave()
            curves[axis] += [contestant.result() for contestant in table]
            for contestant in table:
                print(
                    f"{axis} {getattr(entry, axis):>9,} {contestant.entry.name:6s} "
                    f"{statistics.median(contestant.seconds):.3f} s a round, start "
                    f"{contestant.startup:.1f} s, peak {contestant.peak:.0f} MiB",
                    flush=True,
                )
    write(out / "federation-growth.json", describe() | {"curves": curves})
    draw_growth(curves, out / "federation-growth.png")


def without_path(argument: str) -> str:
    """Where things lie on this machine is nobody's business."""
    return "PATH" if Path(argument).is_absolute() else argument


def describe() -> dict[str, Any]:
    packages = ("torch", "flwr", "ray", "numpy")
    return {
        "command": " ".join(
            ["python", "benchmarks/federation.py", *map(without_path, sys.argv[1:])]
        ),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": SEED,
        "flop_a_round": FLOP_A_ROUND,
        "cores": os.cpu_count(),
        "load_average": os.getloadavg(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "versions": {package: metadata.version(package) for package in packages},
    }


def write(path: Path, report: dict[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {path}")


def draw_comparison(results: Sequence[dict[str, Any]], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    ordered = sorted(results, key=lambda one: one["median_seconds"])
    figure, axes = plt.subplots(1, 3, figsize=(12, 3.8), layout="constrained", sharey=True)
    columns = {
        "median_seconds": "seconds a round",
        "startup_seconds": "seconds from start to first reply",
        "peak_mib": "peak memory, MiB",
    }
    for axis, (key, title) in zip(axes, columns.items(), strict=True):
        colours = ["#c44e52" if one["name"] == "local" else "#8da0b6" for one in ordered]
        bars = axis.barh([one["label"] for one in ordered], [one[key] for one in ordered])
        for bar, colour in zip(bars, colours, strict=True):
            bar.set_color(colour)
        axis.bar_label(bars, fmt="%.3g", padding=3, fontsize=8)
        axis.set_title(title, fontsize=10)
        axis.margins(x=0.18)
        axis.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def draw_growth(curves: dict[str, list[dict[str, Any]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    names = {
        "registered": "registered clients",
        "cohort": "clients a round",
        "parameters": "parameters of the model",
    }
    rows = {"median_seconds": "seconds a round, idle clients", "peak_mib": "peak memory, MiB"}
    figure, axes = plt.subplots(2, 3, figsize=(11, 6), layout="constrained", sharex="col")
    for column, (axis_name, points) in enumerate(curves.items()):
        for row, (key, title) in enumerate(rows.items()):
            axis = axes[row][column]
            for engine in ("local", "ray"):
                mine = [point for point in points if point["name"] == engine]
                if mine:
                    xs = [point[axis_name] for point in mine]
                    axis.plot(xs, [point[key] for point in mine], "o-", label=engine)
            axis.set_xscale("log")
            axis.set_yscale("log")
            axis.grid(alpha=0.3)
            if row:
                axis.set_xlabel(names[axis_name])
            if not column:
                axis.set_ylabel(title)
    axes[0][0].legend()
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    for name, rounds in (("compare", 5), ("grow", 3)):
        command = commands.add_parser(name)
        command.add_argument("--rounds", type=int, default=rounds)
        command.add_argument("--out", type=Path, default=Path("docs/results"))
        if name == "compare":
            command.add_argument("--pfl-python", default=sys.executable)
            command.add_argument("--skip", action="append", default=[], metavar="LABEL")
        else:
            command.add_argument("--with-ray", action="store_true")
    commands.add_parser("contestant").add_argument("entry", type=json.loads)
    arguments = parser.parse_args()
    if arguments.command == "contestant":
        contest(Entry(**arguments.entry))
    elif arguments.command == "compare":
        compare(arguments.rounds, arguments.pfl_python, arguments.skip, arguments.out)
    else:
        grow(arguments.rounds, arguments.with_ray, arguments.out)


if __name__ == "__main__":
    main()
