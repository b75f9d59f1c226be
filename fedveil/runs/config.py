"""Every setting of a training run, checked before anything is written."""

import tomllib
from collections.abc import Mapping
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Literal

from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    field_validator,
    model_validator,
)

from fedveil.errors import FedveilError


class TrainConfig(BaseModel):
    """Settings of ``fedveil train``; each is an option of the command and a key of the TOML file.

    The symbols are those of the papers: K clients, a fraction C of them a round, E local epochs,
    minibatches of B, learning rate η, accuracy cap θ, noise strength σ.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)

    dataset: str = Field(default="digits", min_length=1)
    model: str = Field(default="cnn", min_length=1)
    partition: str = Field(
        default="iid", min_length=1, description="iid, dirichlet:ALPHA or shards:N"
    )
    # Under its first name in runs of before there were defences other than of images.
    defense: str = Field(
        default="none",
        validation_alias=AliasChoices("defense", "transform"),
        description="how clients protect their images: dct:keep=N",
    )
    clients: int = Field(default=100, ge=1, le=1_000_000, description="K")
    fraction: float = Field(default=0.1, gt=0, le=1, description="C")
    rounds: int = Field(default=50, ge=1, le=1_000_000)
    epochs: int = Field(default=1, ge=1, le=10_000, description="E")
    batch_size: int = Field(default=10, ge=1, le=1_000_000, description="B")
    learning_rate: float = Field(default=0.05, gt=0, le=100, description="eta")
    decay: bool = Field(default=False, description="of eta to zero over a client's steps")
    momentum: float = Field(default=0.0, ge=0, lt=1)
    clip: float | None = Field(default=None, gt=0, description="largest norm of a step's gradient")
    augment: str | None = Field(
        default=None, description="of training images: crop:2,rotate:15,zoom:0.1,shear:0.1,flip"
    )
    strategy: Literal["fedavg", "noise-pair", "noise-delta", "protected"] = "protected"
    shared_rounds: int = Field(
        default=0, ge=0, le=1_000_000, description="of protected: rounds of plain averaging"
    )
    share_unlabelled: bool = Field(
        default=False, description="of protected: clients receive the calibration images"
    )
    distillation_steps: int = Field(
        default=40, ge=1, le=1_000_000, description="of protected, a round"
    )
    label_share: float = Field(
        default=0.0, ge=0, le=1, description="of protected: the calibration labels' weight"
    )
    cap: float = Field(default=0.6, gt=0, lt=1, description="theta")
    noise: str | None = Field(
        default=None, min_length=1, description="first-conv, output, all, a pattern"
    )
    temperature: float | None = Field(default=None, ge=0, le=1e6, description="0: none")
    smoothing: float = Field(default=0.0, ge=0, lt=1, description="of the delivered w")
    bound: Literal["labels", "agreement"] = "labels"
    server_clients: int = Field(default=5, ge=0, le=1_000_000, description="|s_t| of noise-pair")
    sigma_start: float = Field(default=0.1, gt=0, le=1e6)
    sigma_step: float = Field(default=0.1, ge=0, le=1e6, description="raise of noise-pair's loop")
    sigma_factor: float = Field(default=1.0, ge=1, le=1e3, description="the same, as a factor")
    sigma_limit: float = Field(default=100.0, gt=0, le=1e9)
    calibration_images: int = Field(default=2_000, ge=20, le=10_000_000)
    report_images: int = Field(
        default=2_000, ge=20, le=10_000_000, description="a round; all at the end"
    )
    fingerprint: float | None = Field(
        default=None, ge=0, le=10, description="of each client's copy, in a layer's RMS; 0: none"
    )
    archive: bool = Field(default=True, description="keep what each client was sent, encrypted")
    norm_limit: float = Field(
        default=10.0, ge=0, le=1e9, description="of a change, in medians of the round; 0: none"
    )
    weight_limit: float = Field(
        default=3.0,
        ge=0,
        le=1e9,
        description="for how many images a client counts, in medians of all claims; 0: no limit",
    )
    average: Literal["mean", "median", "trimmed-mean"] = "mean"
    secure_aggregation: bool = Field(
        default=False, description="the server learns the sum of the changes only, by SecAgg+"
    )
    reconstruction_threshold: float = Field(
        default=0.6, gt=0.5, le=1, description="part of the key shares that undoes a mask"
    )
    key_shares: int | None = Field(
        default=None, ge=5, le=65_535, description="of a key, odd; one a client of the round"
    )
    largest_change: float = Field(
        default=16.0, gt=0, le=1e6, description="of a weight in a round, to be summed"
    )
    engine: Literal["local", "ray", "deployed"] = "local"
    superlink: str | None = Field(default=None, min_length=1, description="host:port")
    root_certificates: str | None = Field(default=None, min_length=1, description="a CA's PEM file")
    app: str | None = Field(
        default=None, min_length=1, description="a signed app: @who/what==1.0.0"
    )
    send_models_unencrypted: bool = False
    workers: int | None = Field(default=None, ge=1, le=1024)
    log: Literal["tensorboard", "mlflow"] | None = Field(
        default=None, description="rounds in files of the run's directory"
    )
    timeout: float = Field(default=3_600, gt=0, description="seconds a round waits for replies")
    seed: int = Field(default=0, ge=0, lt=2**31)

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
    def _no_norm_of_a_sum(cls, settings: Any) -> Any:
        if isinstance(settings, dict) and settings.get("secure_aggregation") is True:
            return {"norm_limit": 0.0, **settings}
        return settings

    @model_validator(mode="after")
    def _sum_must_be_enough(self) -> "TrainConfig":
        if not self.secure_aggregation:
            return self
        alone = [
            (self.strategy == "protected", "strategy protected", "distils what each client knows"),
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
                    "leave out either (it works with --strategy fedavg, noise-pair and noise-delta)"
                )
        if self.key_shares is not None and self.key_shares % 2 == 0:
            raise ValueError(
                f"key-shares {self.key_shares} is even; a neighbourhood has as many clients on "
                "either side, so give an odd number, or leave it out for all clients of a round"
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
    signs = {"ge": "at least", "gt": "above", "le": "at most", "lt": "below"}
    bounds = [
        f"{sign} {getattr(rule, mark):g}"
        for rule in (field.metadata if field else [])
        for mark, sign in signs.items()
        if isinstance(getattr(rule, mark, None), (int, float))
    ]
    return f" (allowed: {' and '.join(bounds)})" if bounds else ""
