"""What a site lets be done with its images, enforced before an app's code is loaded."""

import hashlib
import tomllib
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from pathlib import Path

from flwr.app import ConfigRecord, Message
from flwr.common.secure_aggregation.secaggplus_constants import RECORD_KEY_CONFIGS, Key, Stage
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fedveil.defenses.specs import parse_defense
from fedveil.errors import FedveilError
from fedveil.federation.secagg.client import ANSWERS, SUMMED
from fedveil.federation.task import ClientTask

POLICY = "policy.toml"
"""The file's name in a node's folder."""

_OF_TRAINING = ("train", f"train.{ANSWERS}")  # what a private model answers is as private

_STAGES = (Stage.SETUP, Stage.SHARE_KEYS, Stage.COLLECT_MASKED_VECTORS, Stage.UNMASK)


class PolicyError(FedveilError):
    """What a server asks for exceeds what the site allows."""


class Policy(BaseModel):
    """A site's policy; each attribute is a key of ``policy.toml``, with - for _.

    What is left out is not limited.

    Attributes:
        apps: Apps this node runs, of those that are signed: ``@publisher/name==version``, and with
            `` sha256:HEX`` behind it that bundle alone.
        messages: Kinds of messages it answers, as Flower calls them: ``query``, ``train``,
            ``train.answers``, ``train.statistics``, ``train.gradient``, ``evaluate``.
        models: Models it trains, as ``--model`` names them; ``name sha256:HEX`` also pins the file
            that a ``package.module:factory`` stands in, as it is installed at the site.
        transform: What its images pass through before any app sees them, as ``--defense`` names it.
        smallest_sum: Clients of a sum at least; updates leave the node by secure aggregation only.
        epsilon: ε its updates may spend on one of its images, in all runs together.
        delta: δ of the same promise.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", alias_generator=lambda name: name.replace("_", "-")
    )

    apps: tuple[str, ...] | None = None
    messages: tuple[str, ...] | None = None
    models: tuple[str, ...] | None = None
    transform: str | None = None
    smallest_sum: int | None = Field(default=None, ge=3)
    epsilon: float | None = Field(default=None, gt=0)
    delta: float = Field(default=1e-5, gt=0, lt=1)

    @field_validator("transform")
    @classmethod
    def _is_a_transformation(cls, text: str | None) -> str | None:
        if text is not None:
            try:
                defense = parse_defense(text)
            except FedveilError as error:
                raise ValueError(str(error)) from None
            if defense.transform is None or defense.sanitizer or defense.privacy:
                raise ValueError(f"{text} is no transformation of images alone; try dct:keep=6")
        return text

    @model_validator(mode="after")
    def _apps_must_be_known(self) -> "Policy":
        limits = {
            "models": self.models,
            "smallest-sum": self.smallest_sum,
            "epsilon": self.epsilon,
        }
        named = [name for name, limit in limits.items() if limit is not None]
        if named and not self.apps:
            raise ValueError(
                f"{' and '.join(named)} bind what the server asks for; an app may do otherwise: "
                'name those that keep to it, like apps = ["@fedveil/fedveil-run==1.0.0"]'
            )
        return self

    @classmethod
    def read(cls, path: Path) -> "Policy":
        """Read a policy.

        Raises:
            FedveilError: The file is missing, no TOML, or says what no policy can.
        """
        try:
            return cls.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
        except ValidationError as error:
            wrong = "; ".join(
                f"{'.'.join(map(str, detail['loc']))}: {detail['msg']}" for detail in error.errors()
            )
            known = ", ".join(name.replace("_", "-") for name in cls.model_fields)
            raise FedveilError(f"policy {path}: {wrong}; a policy has {known}") from None
        except (OSError, ValueError, RecursionError) as error:
            raise FedveilError(f"policy {path} cannot be read: {error}") from None

    def check(self, app: str, message: Message, *, bundle: str) -> None:
        """Refuse what exceeds the policy, but for the budget, which ``releases`` tells.

        Args:
            app: ``@publisher/name==version`` of the app that is to run.
            message: What it is to answer.
            bundle: SHA-256 of the app's bundle, hex.

        Raises:
            PolicyError: Names what is asked, and what is allowed.
        """
        kind = message.metadata.message_type
        if self.apps is not None:
            _check_pin("apps", app, self.apps, lambda: bundle)
        _check_listed("messages", kind, self.messages)
        if self.models is not None and kind.partition(".")[0] in ("train", "evaluate"):
            model = _task(message, "models").model
            _check_pin("models", model, self.models, lambda: _digest(model.partition(":")[0]))
        if self.smallest_sum is not None:
            _check_sum(message, self.smallest_sum)

    def releases(self, message: Message) -> bool:
        """Whether answering a message spends privacy: an update may leave with the answer."""
        stage = _stage(message)
        if stage is not None:
            return stage == Stage.COLLECT_MASKED_VECTORS
        return message.metadata.message_type.partition(".")[0] != "query"


def private_task(message: Message) -> ClientTask:
    """Return the task of a message whose answer's ε can be reckoned.

    Raises:
        PolicyError: It cannot: the answer is no local training of fedveil's under DP-SGD.
    """
    task = _task(message, "epsilon")
    privacy = parse_defense(task.defense).privacy
    kind = message.metadata.message_type
    if privacy is None or not privacy.noise or kind not in _OF_TRAINING:
        raise PolicyError(
            f"the site's policy allows an epsilon, and none can be reckoned for {kind!r} with the "
            f"defence {task.defense!r}; train with --strategy noise-delta or protected and "
            "--defense dp-sgd:noise=1"
        )
    return task


def _check_listed(name: str, asked: str, allowed: Sequence[str] | None) -> None:
    if allowed is not None and asked not in allowed:
        raise PolicyError(
            f"the site's policy allows {name} {', '.join(allowed) or 'none'}, and the server asked "
            f"for {asked}"
        )


def _check_pin(
    name: str, asked: str, allowed: Sequence[str], digest: Callable[[], str | None]
) -> None:
    pins = {entry: pin for entry, _, pin in (text.partition(" ") for text in allowed)}
    _check_listed(name, asked, list(pins))
    pin = pins[asked].strip().removeprefix("sha256:")
    if pin and (found := digest()) != pin:
        raise PolicyError(
            f"the site's policy pins {asked} to sha256:{pin}, and what is there is "
            f"{f'sha256:{found}' if found else 'none'}"
        )


def _digest(module: str) -> str | None:
    try:
        found = find_spec(module)
    except (ImportError, ValueError):
        return None
    if found is None or not found.origin or not Path(found.origin).is_file():
        return None
    return hashlib.sha256(Path(found.origin).read_bytes()).hexdigest()


def _check_sum(message: Message, smallest: int) -> None:
    stage = _stage(message)
    if stage is None:
        if message.metadata.message_type.partition(".")[0] != "query":
            raise PolicyError(
                f"the site's policy answers in sums of {smallest} clients and more only, and the "
                "server asked for an answer of this node's own; train with --secure-aggregation"
            )
        return
    if stage != Stage.SETUP:
        # What was set up is kept in the node's own memory, and the app holds every stage to it.
        return
    clients = message.content.config_records[RECORD_KEY_CONFIGS].get(Key.SAMPLE_NUMBER)
    fewest = message.content.config_records[RECORD_KEY_CONFIGS].get(Key.THRESHOLD)
    for told in (clients, fewest):
        if not isinstance(told, int) or told < smallest:
            raise PolicyError(
                f"the site's policy answers in sums of {smallest} clients and more only, and of "
                f"this one's {clients!r} clients {fewest!r} would do; ask more clients a round, or "
                "raise --reconstruction-threshold"
            )


def _stage(message: Message) -> str | None:
    record = message.content.config_records.get(RECORD_KEY_CONFIGS)
    # Messages of any other kind are answered in the clear, whatever record they carry.
    if record is None or message.metadata.message_type not in SUMMED:
        return None
    stage = record.get(Key.STAGE)
    if stage not in _STAGES:
        raise PolicyError(f"the server names a stage of secure aggregation there is not: {stage!r}")
    return str(stage)


def _task(message: Message, rule: str) -> ClientTask:
    record = message.content.config_records.get("config")
    if not isinstance(record, ConfigRecord):
        raise PolicyError(
            f"the site's policy limits {rule}, and this message carries no task of fedveil's to "
            "hold to it; allow the app without that limit, or not at all"
        )
    try:
        return ClientTask.from_record(record)
    except ValidationError as error:
        raise PolicyError(f"the task of this message cannot be read: {error}") from None
