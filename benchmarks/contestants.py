"""Who computes in ``federation.py``: engines, other frameworks, plain loops and the floor.

Run by it, each in a process of its own that plays a round whenever a line comes in.
"""

import json
import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
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


if __name__ == "__main__":
    contest(Entry(**json.loads(sys.argv[1])))
