"""How a pool and its endpoint run: what `--config FILE` may say, and the defaults."""

from __future__ import annotations

import difflib
import ipaddress
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import yaml

from deployments.web.keys import Key, parse_keys
from pipeline.decode import DEFAULT_MAX_PIXELS
from pipeline.errors import UsageError
from pipeline.lanes import LaneLimits
from pipeline.model_info import Dtype

# Fractions, so that a machine of two cores has room for the pool, the endpoint and a job's readers and decoders.
REPLICA_CPUS = 0.5
ENDPOINT_CPUS = 0.1

Nodes = Literal["head", "any"]

_ROUTE = re.compile(r"(/[\w.~:-]+)+")
_URL = re.compile(r"https?://[^\s/]+(/\S*)?")
_HOST = re.compile(r"(\*\.)?[\w.-]+(:\d+)?")


@dataclass(frozen=True, kw_only=True)
class PoolConfig:
    """The model actors.

    `replicas` are always there, and 0 means none while nobody wants any. Online requests may raise them to
    `max_replicas` (None: as many as there always are, at least one), to keep their share of the replicas' time at
    `online_share`; jobs to `batch_max_replicas` (None: as many as online requests may). Where the pool is redeployed
    with changes, `max_surge_percent` of its replicas may be there twice meanwhile.

    `gpus` per replica; None means one where the cluster has GPUs, otherwise none. `device` is what torch calls it, or
    "auto". `threads` of torch per replica on a CPU; None means one for each core, but one alone for a model of less
    than a million weights. `compile` has torch compile the model as the replica starts, and `cuda_graphs` has steps on
    a GPU replayed as graphs. `max_step` is in images; None means 128 on a GPU and 32 on a CPU. `online_step_ms` bounds
    steps while online requests are about; None means 8 on a GPU and 50 on a CPU. Backlogs are in images.
    """

    replicas: int = 1
    max_replicas: int | None = None
    batch_max_replicas: int | None = None
    online_share: float = 0.6
    upscale_delay_s: float = 10.0
    downscale_delay_s: float = 300.0
    max_surge_percent: int = 0
    cpus: float = REPLICA_CPUS
    gpus: float | None = None
    device: str = "auto"
    dtype: Dtype = "float32"
    threads: int | None = None
    compile: bool = False
    cuda_graphs: bool = True
    max_step: int | None = None
    online_step_ms: float | None = None
    max_online_backlog: int = LaneLimits.max_online_backlog
    max_batch_backlog: int = LaneLimits.max_batch_backlog
    startup_timeout_s: float = 600.0

    def __post_init__(self) -> None:
        _at_least(self, 1, "max_replicas", "batch_max_replicas", "threads", "max_step")
        _at_least(self, 1, "max_online_backlog", "max_batch_backlog")
        _at_least(self, 0, "replicas", "online_share", "upscale_delay_s", "downscale_delay_s", "max_surge_percent")
        _at_least(self, 0, "cpus", "gpus", "online_step_ms", "startup_timeout_s")
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise UsageError(f"max_replicas is {self.max_replicas}; it must be at least replicas, {self.replicas}")
        if self.max_surge_percent > 100:
            raise UsageError(f"max_surge_percent is {self.max_surge_percent}; it must be at most 100")
        if not self.online_share:
            raise UsageError("online_share is 0; it must be more")
        if self.dtype not in get_args(Dtype):
            raise UsageError(f"dtype is {self.dtype!r}; it can be {', '.join(get_args(Dtype))}")

    @property
    def online_ceiling(self) -> int:
        """The most replicas that online requests may have."""
        return self.max_replicas or max(self.replicas, 1)

    @property
    def batch_ceiling(self) -> int:
        """The most replicas that jobs may have."""
        return self.batch_max_replicas or self.online_ceiling

    @property
    def ceiling(self) -> int:
        """The most replicas that there may be."""
        return max(self.online_ceiling, self.batch_ceiling)


@dataclass(frozen=True, kw_only=True)
class EndpointConfig:
    """The HTTP side. Sizes in bytes of a request and pixels of one image, times in seconds.

    `max_backlog` is in images of all requests that one process has read and not answered: beyond it, it takes no more.
    `image_url_hosts` are those from which images may be fetched for a caller: names, `*.name`, or `name:port`; none
    means that no URL is fetched. `health_route` and `predict_route` are those of a Vertex AI container. `keys` are
    lines as `tandem key` prints them; where there are some, a request needs one, and may come `rate_per_s` times with
    it to each of the processes. `replicas` are processes, which share the port where they share a node; `nodes` they
    may be on are the head alone, or any, and on those other than the head they listen at the same port. `traces_to` is
    the URL of an OpenTelemetry collector.
    """

    replicas: int = 1
    cpus: float = ENDPOINT_CPUS
    max_body_bytes: int = 32 << 20
    max_pixels: int = DEFAULT_MAX_PIXELS
    max_images: int = 64
    max_backlog: int = 1024
    timeout_s: float = 30.0
    decode_threads: int = 2
    image_url_hosts: tuple[str, ...] = ()
    health_route: str | None = None
    predict_route: str | None = None
    keys: tuple[str, ...] = ()
    rate_per_s: float | None = None
    nodes: Nodes = "head"
    traces_to: str | None = None

    def __post_init__(self) -> None:
        _at_least(self, 1, "replicas", "max_body_bytes", "max_pixels", "max_images", "max_backlog", "decode_threads")
        _at_least(self, 0, "cpus", "timeout_s", "rate_per_s")
        if self.rate_per_s == 0:
            raise UsageError("rate_per_s is 0; it must be more, or not be there")
        if self.nodes not in get_args(Nodes):
            raise UsageError(f"nodes is {self.nodes!r}; it can be {', '.join(get_args(Nodes))}")
        if self.traces_to is not None and not _URL.fullmatch(self.traces_to):
            raise UsageError(f"traces_to is {self.traces_to!r}; it must be a collector's URL, such as http://host:4318")
        for line in self.keys:
            Key.parse(line)
        for name in ("health_route", "predict_route"):
            route = getattr(self, name)
            if route is not None and not _ROUTE.fullmatch(route):
                raise UsageError(f"{name} is {route!r}; it must be a path, such as /health")
        for host in self.image_url_hosts:
            if not _HOST.fullmatch(host):
                raise UsageError(f"image_url_hosts has {host!r}; it must be a name, *.name or name:port")


@dataclass(frozen=True, kw_only=True)
class Config:
    """A configuration file: the sections `pool` and `endpoint`, each with the fields of its class."""

    pool: PoolConfig = field(default_factory=PoolConfig)
    endpoint: EndpointConfig = field(default_factory=EndpointConfig)


def load_config(path: str | None) -> Config:
    """The configuration in a YAML file, or the defaults for None. Raises `UsageError`, naming file and option."""
    if path is None:
        return Config()
    try:
        content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"--config {path} is not YAML: {' '.join(str(error).split())}") from error
    try:
        return parse_config({} if content is None else content)
    except UsageError as error:
        raise UsageError(f"--config {path}: {error}") from error


def parse_config(content: Any) -> Config:
    """The configuration that a mapping of sections says. Raises `UsageError`."""
    sections = _known(content, Config, "the file")
    return Config(
        pool=_section(PoolConfig, sections.get("pool"), "pool"),
        endpoint=_section(EndpointConfig, sections.get("endpoint"), "endpoint"),
    )


def with_keys(config: Config, path: str | None, environment: Mapping[str, str]) -> Config:
    """The configuration, with the keys in a file and in `TANDEM_KEYS` added. Raises `UsageError`."""
    endpoint = config.endpoint
    told = {"TANDEM_KEYS": environment.get("TANDEM_KEYS", "").replace(";", "\n")}
    if path is not None:
        try:
            told[f"--keys {path}"] = Path(path).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--keys {path} cannot be read: {getattr(error, 'strerror', error)}") from error
    for source, text in told.items():
        try:
            endpoint = replace(endpoint, keys=(*endpoint.keys, *parse_keys(text)))
        except UsageError as error:
            raise UsageError(f"{source}: {error}") from error
    return replace(config, endpoint=endpoint)


def check_exposure(host: str, config: Config, *, allow_anonymous: bool) -> None:
    """Raises `UsageError` for an endpoint that strangers could reach and that would ask them for no key."""
    try:
        loopback = host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        loopback = False
    if not (loopback or config.endpoint.keys or allow_anonymous):
        raise UsageError(
            f"--host {host} is reached from other machines, so the endpoint needs keys: make one with tandem key, "
            "name its file with --keys, or say --allow-anonymous"
        )


def with_routes_of_container(config: Config, environment: Mapping[str, str]) -> Config:
    """The configuration, with the routes that Vertex AI tells its containers where it has none. Raises `UsageError`."""
    endpoint = config.endpoint
    try:
        endpoint = replace(
            endpoint,
            health_route=endpoint.health_route or environment.get("AIP_HEALTH_ROUTE") or None,
            predict_route=endpoint.predict_route or environment.get("AIP_PREDICT_ROUTE") or None,
        )
    except UsageError as error:
        raise UsageError(f"AIP_HEALTH_ROUTE or AIP_PREDICT_ROUTE: {error}") from error
    return replace(config, endpoint=endpoint)


Section = TypeVar("Section", PoolConfig, EndpointConfig)


def _section(kind: type[Section], content: Any, where: str) -> Section:
    options = _known({} if content is None else content, kind, where)
    kinds = {known.name: str(known.type) for known in fields(kind)}
    for name, value in options.items():
        if not _fits(value, kinds[name]):
            raise UsageError(f"{where}.{name} is {value!r}; it must be {_told(kinds[name])}")
    values: dict[str, Any] = {name: tuple(one) if isinstance(one, list) else one for name, one in options.items()}
    try:
        return kind(**values)
    except UsageError as error:
        raise UsageError(f"{where}.{error}") from error


def _known(content: Any, kind: type, where: str) -> Mapping[str, Any]:
    if not isinstance(content, Mapping):
        raise UsageError(f"{where} must be a mapping of options, not {type(content).__name__}")
    names = [known.name for known in fields(kind)]
    for name in content:
        if name not in names:
            close = difflib.get_close_matches(str(name), names, n=1)
            hint = f" (do you mean {close[0]}?)" if close else ""
            raise UsageError(f"{where} has no option {name!r}{hint}; it has {', '.join(names)}")
    return content


def _fits(value: Any, kind: str) -> bool:
    if value is None:
        return kind.endswith("| None")
    if isinstance(value, bool) or kind == "bool":
        return isinstance(value, bool) and kind == "bool"
    if kind.startswith("tuple"):
        return isinstance(value, list | tuple) and all(isinstance(one, str) for one in value)
    if "float" in kind:
        return isinstance(value, int | float)
    if "int" in kind:
        return isinstance(value, int)
    return "str" not in kind or isinstance(value, str)  # the values of other types are checked by their class


def _told(kind: str) -> str:
    return "a list of str" if kind.startswith("tuple") else kind.replace(" | None", "")


def _at_least(config: object, low: float, *names: str) -> None:
    for name in names:
        value = getattr(config, name)
        if value is not None and not low <= value < math.inf:
            raise UsageError(f"{name} is {value}; it must be at least {low}, and finite")
