"""Every setting of a training run, checked before anything is written."""

import math
import tomllib
from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)
from pydantic.config import JsonDict

from fedveil.errors import FedveilError
from fedveil.settings import SIGNS, allowed

Group = Literal[
    "Data",
    "Training",
    "Protection",
    "Noise",
    "Both ways",
    "Secure aggregation",
    "Deployment",
    "Output",
]
"""Under which the help of ``fedveil train`` lists an option, in this order."""


STRATEGIES: Mapping[str, str] = {
    "fedavg": "fedveil.federation.strategies.fedavg:SeededFedAvg",
    "noise-pair": "fedveil.federation.strategies.noise_pair:NoisePair",
    "noise-delta": "fedveil.federation.strategies.noise_delta:NoiseDelta",
    "protected": "fedveil.federation.strategies.ensemble_distillation:EnsembleDistillation",
    "analytic": "fedveil.federation.strategies.analytic:Analytic",
}
"""Where each strategy is that a run can name; settings are read without loading any."""

if TYPE_CHECKING:
    StrategyName = str
else:
    StrategyName = Literal[*STRATEGIES]


def setting(
    default: Any, group: Group, told: str, *, flags: tuple[str, ...] = (), **limits: Any
) -> Any:
    """Return a field: default, heading, help, options and range of one setting, in one place.

    Args:
        default: Where nothing is given.
        group: The heading it is under.
        told: Its help.
        flags: Its options on the command line, where they are not its name.
        limits: As pydantic's ``Field`` has them: ge, gt, le, lt, min_length, …
    """
    shown: JsonDict = {"group": group, "flags": list(flags)}
    return Field(default=default, description=told, json_schema_extra=shown, **limits)


class TrainConfig(BaseModel):
    """Settings of ``fedveil train``; each is an option of the command and a key of the TOML file.

    A field is all there is of an option: its default, help, heading and range are read off it.

    The symbols are those of the papers: K clients, a fraction C of them a round, E local epochs,
    minibatches of B, learning rate η, accuracy cap θ, noise strength σ.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)

    dataset: str = setting(
        "digits",
        "Data",
        "digits, photos, mnist, cifar10, cifar100, a hub name, a path.",
        min_length=1,
    )
    model: str = setting(
        "cnn",
        "Training",
        "cnn, mnist-cnn, lenet, resnet-gn, wide-resnet-gn, resnet-bn, vit or "
        "package.module:factory.",
        min_length=1,
    )
    partition: str = setting("iid", "Data", "iid, dirichlet:ALPHA or shards:CLASSES.", min_length=1)
    defense: str = setting(
        "none",
        "Protection",
        "How clients protect their images: dct:keep=N and others of docs/defenses.md.",
        validation_alias=AliasChoices("defense", "transform"),
        flags=("--defense", "--transform"),
    )
    clients: int = setting(100, "Training", "K: clients in all.", ge=1, le=1_000_000)
    fraction: float = setting(
        0.1,
        "Training",
        "C: fraction of them a round; where it is left out, ten clients at least, or all.",
        gt=0,
        le=1,
    )
    rounds: int = setting(
        50, "Training", "Rounds to train; with --resume, in all.", ge=1, le=1_000_000
    )
    deliver: Literal["best", "last"] = setting(
        "best",
        "Training",
        "Whose w is delivered: of the round that is best on the calibration images, or of the "
        "last.",
    )
    epochs: int = setting(1, "Training", "E: local epochs.", ge=1, le=10_000)
    batch_size: int = setting(10, "Training", "B: local minibatch.", ge=1, le=1_000_000)
    learning_rate: float = setting(0.05, "Training", "eta: local learning rate.", gt=0, le=100)
    decay: bool = setting(
        False,
        "Training",
        "Let eta fall to zero over a client's steps of a round.",
        flags=("--decay/--no-decay",),
    )
    momentum: float = setting(0.0, "Training", "Local momentum.", ge=0, lt=1)
    clip: float | None = setting(None, "Training", "Largest norm of a local gradient.", gt=0)
    augment: str | None = setting(
        None,
        "Data",
        "Random changes of training images: crop:2,rotate:15,zoom:0.1,shear:0.1,flip, or some of "
        "them.",
    )
    strategy: StrategyName = setting(
        "analytic",
        "Protection",
        "How the model is protected; protected, where a --model or how to train it is given.",
    )
    backbone: str | None = setting(
        None,
        "Both ways",
        "analytic: efficientnet-lite0 or package.module:factory instead of a dictionary made of "
        "the calibration images.",
        min_length=1,
    )
    filters: int | None = setting(
        None, "Both ways", "analytic: filters of the dictionary, 8 features each.", ge=1, le=100_000
    )
    mirrored: bool | None = setting(
        None,
        "Both ways",
        "analytic: look at mirror images, too; by default where they are told as well.",
    )
    resolution: int = setting(
        128, "Both ways", "analytic: side in pixels of a backbone's input.", ge=32, le=512
    )
    stages: int | None = setting(
        None,
        "Both ways",
        "analytic: stages of efficientnet-lite0 that are looked at; as many as images allow.",
        ge=1,
        le=7,
    )
    images_per_feature: float = setting(
        8.0, "Both ways", "analytic: images a feature that a sum must have.", ge=4, le=1e6
    )
    components: int | None = setting(
        None,
        "Both ways",
        "analytic: keep so many principal components of the features.",
        ge=1,
        le=100_000,
    )
    balanced: bool = setting(
        False,
        "Both ways",
        "analytic: let every class be as likely, however few images it has.",
        flags=("--balanced/--no-balanced",),
    )
    distil_into: str | None = setting(
        None,
        "Both ways",
        "analytic: teach w to this network, too, named as of --model, by the calibration images: "
        "distilled.safetensors.",
        min_length=1,
    )
    epsilon: float | None = setting(
        None,
        "Both ways",
        "analytic, protected: differential privacy of what clients return.",
        gt=0,
        le=1000,
    )
    delta: float = setting(1e-5, "Both ways", "With --epsilon.", gt=0, lt=1)
    privacy_unit: Literal["image", "client"] = setting(
        "image",
        "Both ways",
        "Whom --epsilon protects: an image, or a client; of protected a client.",
    )
    shared_rounds: int = setting(
        0,
        "Both ways",
        "Rounds of plain averaging before protected sends nothing more.",
        ge=0,
        le=1_000_000,
    )
    share_unlabelled: bool = setting(
        False,
        "Both ways",
        "protected: clients that lack a class learn from the calibration images, too.",
    )
    distillation_steps: int = setting(
        120, "Both ways", "Steps a round in which protected teaches w.", ge=1, le=1_000_000
    )
    questions: str | None = setting(
        None,
        "Both ways",
        "protected: a public dataset whose images clients answer instead of the calibration "
        "images.",
        min_length=1,
    )
    answer_temperature: float = setting(
        1.0,
        "Both ways",
        "protected: how flat the clients' answers are, and w is taught.",
        gt=0,
        le=1000,
    )
    label_share: float = setting(
        0.0,
        "Both ways",
        "protected: how much w learns the calibration images' labels instead of the clients' "
        "answers, from 0 to 1.",
        ge=0,
        le=1,
    )
    cap: float = setting(0.6, "Protection", "theta: accuracy every copy stays below.", gt=0, lt=1)
    noise: str | None = setting(
        None, "Noise", "first-conv, output, all or a pattern over parameters.", min_length=1
    )
    temperature: float | None = setting(
        None, "Noise", "How flat the copies' logits are; 0: as trained.", ge=0, le=1e6
    )
    smoothing: float = setting(
        0.0, "Noise", "How much of the last w noise-delta keeps in w, below 1.", ge=0, lt=1
    )
    bound: Literal["labels", "agreement"] = setting(
        "labels",
        "Noise",
        "What copies are checked with.",
    )
    server_clients: int = setting(
        5, "Noise", "|s|: server-side clients of noise-pair.", ge=0, le=1_000_000
    )
    sigma_start: float = setting(0.1, "Noise", "First sigma tried.", gt=0, le=1e6)
    sigma_step: float = setting(0.1, "Noise", "Raise of noise-pair's loop.", ge=0, le=1e6)
    sigma_factor: float = setting(1.0, "Noise", "The same, as a factor.", ge=1, le=1e3)
    sigma_limit: float = setting(100.0, "Noise", "Largest sigma tried.", gt=0, le=1e9)
    calibration_images: int = setting(
        2_000, "Noise", "Test images sigma is calibrated on.", ge=20, le=10_000_000
    )
    report_images: int = setting(
        2_000, "Output", "Other test images each round reports on.", ge=20, le=10_000_000
    )
    fingerprint: float | None = setting(
        None,
        "Protection",
        "Individual noise in each client's copy, in a layer's RMS; 0: none.",
        ge=0,
        le=10,
    )
    archive: bool = setting(
        True,
        "Protection",
        "Keep what each client was sent, encrypted.",
    )
    norm_limit: float = setting(
        10.0,
        "Protection",
        "Refuse changes longer than so many medians of the round; 0: none.",
        ge=0,
        le=1e9,
    )
    weight_limit: float = setting(
        3.0,
        "Protection",
        "Count a client for so many medians of all claims at most; 0: no limit.",
        ge=0,
        le=1e9,
    )
    average: Literal["mean", "median", "trimmed-mean"] = setting(
        "mean",
        "Protection",
        "How answers are averaged; mean weighs by images.",
    )
    secure_aggregation: bool = setting(
        False,
        "Secure aggregation",
        "Let the server learn the sum of what clients return only, by SecAgg+; analytic and "
        "protected do unless there are too few clients.",
        flags=("--secure-aggregation/--no-secure-aggregation",),
    )
    reconstruction_threshold: float = setting(
        0.6,
        "Secure aggregation",
        "Part of a round's clients that must stay to the end for the sum.",
        gt=0.5,
        le=1,
    )
    key_shares: int | None = setting(
        None,
        "Secure aggregation",
        "Clients that each shares keys with, odd; by default all of the round, 15 of over 20.",
        ge=5,
        le=65_535,
    )
    largest_change: float = setting(
        16.0, "Secure aggregation", "Largest change of a weight that can be summed.", gt=0, le=1e6
    )
    engine: Literal["local", "ray", "deployed"] = setting(
        "local",
        "Deployment",
        "What runs the clients.",
    )
    superlink: str | None = setting(
        None, "Deployment", "HOST:PORT of a running SuperLink, for --engine deployed.", min_length=1
    )
    root_certificates: str | None = setting(
        None,
        "Deployment",
        "PEM file of the CA that signed the SuperLink's certificate.",
        min_length=1,
    )
    app: str | None = setting(
        None,
        "Deployment",
        "Signed app for nodes that run no other: @who/what==1.0.0.",
        min_length=1,
    )
    send_models_unencrypted: bool = setting(
        False,
        "Deployment",
        "Let models and updates travel to another machine in the clear.",
    )
    workers: int | None = setting(None, "Training", "Worker processes; one a core.", ge=1, le=1024)
    log: Literal["tensorboard", "mlflow"] | None = setting(
        None,
        "Output",
        "Also write rounds for TensorBoard or MLflow, in --out.",
    )
    timeout: float = setting(3_600, "Deployment", "Seconds a round waits.", gt=0)
    seed: int = setting(0, "Data", "Seeds data, model, sampling, training.", ge=0, lt=2**31)

    @field_validator("defense", mode="before")
    @classmethod
    def _no_transform(cls, value: Any) -> Any:
        return "none" if value is None else value

    @model_validator(mode="after")
    def _sigma_must_rise(self) -> "TrainConfig":
        if self.sigma_step == 0 and self.sigma_factor == 1:
            raise ValueError("sigma-step 0 with sigma-factor 1 never raises sigma; raise either")
        return self

    @model_validator(mode="after")
    def _average_must_fit(self) -> "TrainConfig":
        if self.average != "mean" and self.strategy not in ("fedavg", "noise-delta"):
            raise ValueError(
                f"average {self.average} is for fedavg and noise-delta; {self.strategy} is defined "
                "by its weighted means"
            )
        return self

    @model_validator(mode="before")
    @classmethod
    def _defaults_that_follow(cls, settings: Any) -> Any:
        if not isinstance(settings, dict):
            return settings
        given = {name for name, value in settings.items() if value is not None}
        chosen = {"strategy": "protected" if given & _OF_TRAINING else "analytic", **settings}
        follow = _of_sums(chosen) if chosen["strategy"] == "analytic" else _of_rounds(chosen)
        chosen = follow | chosen
        if chosen.get("secure_aggregation") is True:
            chosen = {"norm_limit": 0.0, **chosen}  # nobody sees a change to measure
        if chosen["strategy"] == "analytic" or chosen.get("bound") == "agreement":
            # Sums grow with every round; and without labels nobody can tell which is best.
            chosen = {"deliver": "last", **chosen}
        return chosen

    @model_validator(mode="after")
    def _sum_must_be_enough(self) -> "TrainConfig":
        if not self.secure_aggregation:
            return self
        alone = [
            (self.average != "mean", f"average {self.average}", "compares the clients' changes"),
            (
                self.norm_limit > 0,
                f"norm-limit {self.norm_limit:g}",
                "measures every change",
            ),
        ]
        for chosen, setting, does in alone:
            if chosen:
                raise ValueError(
                    f"{setting} {does}, and secure-aggregation shows the server their sum only; "
                    "leave out either (it works with every --strategy)"
                )
        if self.key_shares is not None and self.key_shares % 2 == 0:
            raise ValueError(
                f"key-shares {self.key_shares} is even; a neighbourhood has as many clients on "
                "either side, so give an odd number, or leave it out for all clients of a round"
            )
        return self

    @model_validator(mode="after")
    def _sums_grow(self) -> "TrainConfig":
        if self.strategy == "analytic" and self.deliver == "best":
            raise ValueError(
                "deliver best is for strategies that train over rounds, and analytic's last round "
                "is of all clients that were asked: leave it out"
            )
        return self

    @model_validator(mode="after")
    def _sums_are_of_whole_images(self) -> "TrainConfig":
        if self.epsilon is not None and self.strategy not in ("analytic", "protected"):
            raise ValueError(
                f"epsilon is of strategies analytic and protected; {self.strategy} takes --defense "
                "dp-sgd:noise=N"
            )
        of_sums = self.strategy == "analytic"
        if self.distil_into is not None and not of_sums:
            raise ValueError(
                f"distil-into {self.distil_into} is of strategy analytic; {self.strategy} trains "
                "--model itself: leave it out"
            )
        if self.balanced and (not of_sums or self.epsilon is not None):
            raise ValueError(
                "balanced is of strategy analytic without epsilon, whose noisy sums do not tell "
                "how many images a class has: leave it out"
            )
        if of_sums and self.epsilon and self.privacy_unit == "client" and not self.weight_limit:
            raise ValueError(
                "privacy-unit client bounds a client's images: give a weight-limit above 0"
            )
        if self.strategy == "analytic" and self.backbone is not None and self.filters is not None:
            raise ValueError(
                f"filters is of a dictionary, and backbone {self.backbone} takes its place; leave "
                "out either"
            )
        if self.stages is not None and self.backbone != "efficientnet-lite0":
            raise ValueError(
                f"stages are of backbone efficientnet-lite0, not of {self.backbone or 'none'}; "
                "leave them out or name it"
            )
        return self

    @model_validator(mode="after")
    def _questions_must_be_others(self) -> "TrainConfig":
        if self.questions is None:
            return self
        if self.strategy != "protected":
            raise ValueError(f"questions is of strategy protected, and this is {self.strategy}")
        if self.label_share:
            raise ValueError(
                f"label-share {self.label_share:g} is of the calibration images, and questions "
                f"{self.questions} takes their place; leave out either"
            )
        if self.questions.partition("@")[0] == self.dataset.partition("@")[0]:
            raise ValueError(
                f"questions {self.questions} is the clients' own data; leave it out to ask about "
                "the calibration images"
            )
        return self

    @model_validator(mode="after")
    def _votes_must_hide_a_client(self) -> "TrainConfig":
        if self.epsilon is None or self.strategy != "protected":
            return self
        if self.privacy_unit != "client":
            raise ValueError(
                "epsilon of strategy protected is a whole client's, whose votes have the noise: "
                "give privacy-unit client; an image alone is hidden by --defense dp-sgd:noise=N"
            )
        alone = [
            (self.shared_rounds > 0, f"shared-rounds {self.shared_rounds}", "sends models back"),
            (
                self.defense.startswith("dp-sgd"),
                f"defense {self.defense}",
                "has an epsilon of its own, of an image",
            ),
            (
                self.answer_temperature != 1,
                f"answer-temperature {self.answer_temperature:g}",
                "is of probabilities, and clients vote",
            ),
        ]
        for chosen, setting, does in alone:
            if chosen:
                raise ValueError(f"{setting} {does}; leave out either it or epsilon")
        return self

    @model_validator(mode="after")
    def _sums_train_nothing(self) -> "TrainConfig":
        if self.strategy != "analytic":
            return self
        fields = TrainConfig.model_fields
        for name in sorted(_OF_TRAINING & fields.keys() - {"rounds", "defense", "norm_limit"}):
            if getattr(self, name) != fields[name].default:
                raise ValueError(
                    f"{name} is for clients that train a model, and those of strategy analytic "
                    "return sums over their images; leave it out, or name another strategy"
                )
        return self

    @model_validator(mode="after")
    def _superlink_must_be_encrypted(self) -> "TrainConfig":
        if self.superlink is None:
            return self
        if self.engine != "deployed":
            raise ValueError(f"superlink is for engine deployed, not {self.engine}")
        host, _, port = self.superlink.rpartition(":")
        if not host or not port.isdecimal():
            raise ValueError(f"superlink {self.superlink!r} is no address; give HOST:PORT")
        encrypted = self.root_certificates is not None
        if not (encrypted or is_loopback(host) or self.send_models_unencrypted):
            raise ValueError(
                f"superlink {self.superlink} is on another machine, and without root-certificates "
                "every model and update would travel in the clear; give --root-certificates FILE, "
                "or force it with --send-models-unencrypted"
            )
        return self

    @classmethod
    def check(cls, settings: Mapping[str, Any]) -> "TrainConfig":
        """Validate settings by name.

        Raises:
            FedveilError: Names each wrong key, its value and what is allowed.
        """
        try:
            return cls.model_validate(dict(settings))
        except ValidationError as error:
            lines = [_explain(detail) for detail in error.errors()]
            raise FedveilError("\n".join(lines)) from None

    @classmethod
    def read(cls, path: Path, **overrides: Any) -> "TrainConfig":
        """Read a TOML file whose keys are the settings' names, with - or _ between words.

        Args:
            path: The file.
            overrides: Settings that take the place of the file's.

        Raises:
            FedveilError: The file is missing or no TOML, or a setting is wrong.
        """
        try:
            settings = tomllib.loads(path.read_text(encoding="utf-8"))
        # Of the parser: ValueError on a number too long, RecursionError on a list too deep.
        except (OSError, ValueError, RecursionError) as error:
            raise FedveilError(f"--config {path}: {error}") from None
        named = {key.replace("-", "_"): value for key, value in settings.items()}
        return cls.check(named | overrides)


_OF_TRAINING = frozenset(
    {
        *("model", "rounds", "epochs", "batch_size", "learning_rate", "decay", "momentum", "clip"),
        *("augment", "defense", "transform", "shared_rounds", "share_unlabelled", "cap", "noise"),
        *("distillation_steps", "label_share", "answer_temperature", "temperature", "smoothing"),
        *("questions", "bound", "average", "server_clients"),
        *("sigma_start", "sigma_step", "sigma_factor", "sigma_limit"),
        *("fingerprint", "norm_limit"),
    }
)
"""Settings that mean nothing where clients train no model."""

_FEWEST_TO_SUM = 3  # of a sum of two, each knows the other's part
_MANY_TO_SUM = 20
_KEY_SHARES = 15


def _of_sums(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the defaults of runs whose clients are asked once, and all of them."""
    return {"rounds": 1, "fraction": 1.0, **_of_secure_sums(settings, fraction=1.0)}


def _of_secure_sums(settings: Mapping[str, Any], *, fraction: float) -> dict[str, Any]:
    """Return the defaults of runs whose clients' whole numbers are summed.

    Args:
        settings: What is given.
        fraction: Of the clients a round asks where it is not given.
    """
    clients = settings.get("clients", TrainConfig.model_fields["clients"].default)
    try:
        asked = math.floor(float(clients) * float(settings.get("fraction") or fraction) + 1e-9)
    except (TypeError, ValueError, OverflowError):
        return {}  # pydantic says so
    secure = settings.get("secure_aggregation", asked >= _FEWEST_TO_SUM)
    found: dict[str, Any] = {"secure_aggregation": secure}
    if secure and asked > _MANY_TO_SUM:
        found["key_shares"] = _KEY_SHARES  # of each with all others they would take the time
    return found


def _of_rounds(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return the defaults of runs whose clients train in rounds."""
    found: dict[str, Any] = {}
    # A tenth of five clients is one: its update would be the round, and nobody's cover.
    clients = settings.get("clients")
    if isinstance(clients, int) and 0 < clients < 100 and settings.get("fraction") is None:
        found["fraction"] = min(1.0, 10 / clients)
    if settings["strategy"] != "protected":
        return found
    # Clients whose models teach w, each alone, have to come far by themselves.
    found = {**_ALONE, **found}
    if settings.get("epsilon") is not None:
        found |= {"rounds": 1, "fraction": 1.0, "privacy_unit": "client", "distillation_steps": 800}
    usual = found.get("fraction", TrainConfig.model_fields["fraction"].default)
    return {**found, **_of_secure_sums(settings, fraction=usual)}


_ALONE: Mapping[str, Any] = {
    "rounds": 20,
    "epochs": 30,
    "batch_size": 20,
    "learning_rate": 0.1,
    "decay": True,
    "momentum": 0.9,
    "clip": 1.0,
}


def is_loopback(host: str) -> bool:
    """Whether an address never leaves this machine."""
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def _explain(detail: Any) -> str:
    name = "-".join(str(part) for part in detail["loc"]).replace("_", "-")
    if detail["type"] == "extra_forbidden":
        known = ", ".join(field.replace("_", "-") for field in TrainConfig.model_fields)
        return f"unknown setting {name!r}; known: {known}"
    why = str(detail["msg"]).removeprefix("Value error, ")
    if not name:
        return why
    return f"setting {name} = {detail['input']!r} is not allowed: {why}{_range(name)}"


def _range(name: str) -> str:
    field = TrainConfig.model_fields.get(name.replace("-", "_"))
    limits = {
        sign: getattr(rule, sign)
        for rule in (field.metadata if field else [])
        for sign in SIGNS
        if isinstance(getattr(rule, sign, None), (int, float))
    }
    return f" (allowed: {allowed(limits)})" if limits else ""
