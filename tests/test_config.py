"""A configuration file says what its classes know, or the message says which option is wrong and what it can be."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import yaml

from deployments.config import (
    Config,
    EndpointConfig,
    PoolConfig,
    check_exposure,
    load_config,
    parse_config,
    with_keys,
    with_routes_of_container,
)
from deployments.web.keys import Scope, new_key
from pipeline.errors import UsageError

_SECTIONS = {"pool": PoolConfig, "endpoint": EndpointConfig}
_OPTIONS = [(section, option) for section, kind in _SECTIONS.items() for option in dataclasses.fields(kind)]
_NUMBERS = [(section, option.name) for section, option in _OPTIONS if str(option.type)[:3] in ("int", "flo")]
_ROUTES = {"health_route": "/health", "predict_route": "/v1/endpoints/e:predict"}
_KEY = str(new_key("nightly", [Scope.PREDICT])[1])
_VALUES = {
    "keys": (_KEY,),
    "device": "cuda:0",
    "dtype": "bfloat16",
    "nodes": "any",
    "traces_to": "http://collector:4318",
    "compile": True,
    "cuda_graphs": False,
    "image_url_hosts": ("*.images.org", "localhost:80"),
    **_ROUTES,
}


def _written(tmp_path: Path, text: str) -> str:
    path = tmp_path / "tandem.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


@pytest.mark.parametrize(("section", "option"), _OPTIONS, ids=lambda value: getattr(value, "name", value))
def test_every_option_is_taken_from_the_file(section: str, option: dataclasses.Field[Any], tmp_path: Path) -> None:
    value = _VALUES.get(option.name, 3)
    text = yaml.safe_dump({section: {option.name: list(value) if isinstance(value, tuple) else value}})
    config = load_config(_written(tmp_path, text))
    assert getattr(getattr(config, section), option.name) == value
    assert dataclasses.replace(getattr(config, section), **{option.name: option.default}) == _SECTIONS[section]()


@pytest.mark.parametrize(("section", "name"), _NUMBERS)
@pytest.mark.parametrize("value", [-1, -0.5, math.nan, math.inf, "3", True, [3]])
def test_a_number_that_cannot_be_is_refused_by_name_and_value(section: str, name: str, value: Any) -> None:
    with pytest.raises(UsageError, match=rf"^{section}\.{name} is ") as caught:
        parse_config({section: {name: value}})
    assert str(value) in str(caught.value)


@pytest.mark.parametrize(
    "name",
    ["max_replicas", "batch_max_replicas", "threads", "max_step", "max_online_backlog", "max_batch_backlog"],
)
def test_counts_of_the_pool_are_at_least_one(name: str) -> None:
    with pytest.raises(UsageError, match=rf"^pool\.{name} is 0; it must be at least 1"):
        parse_config({"pool": {name: 0}})


@pytest.mark.parametrize("route", ["health", "/", "", "/a b", "/a?b", "//a", 3])
def test_a_route_that_is_no_path_is_refused(route: Any) -> None:
    with pytest.raises(UsageError, match=r"^endpoint\.health_route is "):
        parse_config({"endpoint": {"health_route": route}})


@pytest.mark.parametrize("hosts", ["images.org", [""], ["*"], ["http://images.org"], ["a/b"], ["a:b"], [3]])
def test_a_host_that_is_no_name_is_refused(hosts: Any) -> None:
    with pytest.raises(UsageError, match=r"^endpoint\.image_url_hosts "):
        parse_config({"endpoint": {"image_url_hosts": hosts}})


def test_what_does_not_fit_together_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^pool\.max_replicas is 2; it must be at least replicas, 3"):
        parse_config({"pool": {"replicas": 3, "max_replicas": 2}})
    with pytest.raises(UsageError, match=r"^pool\.max_surge_percent is 101; it must be at most 100"):
        parse_config({"pool": {"max_surge_percent": 101}})
    with pytest.raises(UsageError, match=r"^pool\.online_share is 0"):
        parse_config({"pool": {"online_share": 0}})


@pytest.mark.parametrize(
    ("pool", "online", "most"),
    [
        ({}, 1, 1),
        ({"replicas": 3}, 3, 3),
        ({"replicas": 0}, 1, 1),
        ({"replicas": 0, "batch_max_replicas": 5}, 1, 5),
        ({"replicas": 2, "max_replicas": 4}, 4, 4),
        ({"replicas": 2, "max_replicas": 4, "batch_max_replicas": 3}, 4, 4),
        ({"replicas": 2, "batch_max_replicas": 1}, 2, 2),
    ],
)
def test_ceilings_follow_from_what_is_said(pool: dict[str, int], online: int, most: int) -> None:
    config = PoolConfig(**pool)  # type: ignore[arg-type]
    assert (config.online_ceiling, config.ceiling) == (online, most)


@pytest.mark.parametrize("value", ["float64", 16, None, ["float32"]])
def test_an_unknown_dtype_is_refused_and_the_known_ones_listed(value: Any) -> None:
    with pytest.raises(UsageError, match=r"dtype is .*(must|can) be.*"):
        parse_config({"pool": {"dtype": value}})


@pytest.mark.parametrize("name", ["gpus", "threads", "max_step"])
def test_what_is_chosen_by_the_machine_can_be_null(name: str) -> None:
    assert parse_config({"pool": {name: None}}) == Config()


@pytest.mark.parametrize("name", ["replicas", "device", "cpus"])
def test_what_is_not_chosen_by_the_machine_cannot_be_null(name: str) -> None:
    with pytest.raises(UsageError, match=rf"pool\.{name} is None"):
        parse_config({"pool": {name: None}})


def test_an_unknown_option_is_refused_with_the_one_that_was_meant() -> None:
    with pytest.raises(
        UsageError, match=r"pool has no option 'replica' \(do you mean replicas\?\); it has replicas, max_replicas"
    ):
        parse_config({"pool": {"replica": 2}})


@pytest.mark.parametrize("name", ["zzz", 1, None, True])
def test_an_option_like_no_other_is_refused_with_the_list(name: Any) -> None:
    with pytest.raises(UsageError, match=rf"endpoint has no option {name!r}; it has replicas, "):
        parse_config({"endpoint": {name: 2}})


def test_an_unknown_section_is_refused_with_the_one_that_was_meant() -> None:
    with pytest.raises(
        UsageError, match=r"the file has no option 'pools' \(do you mean pool\?\); it has pool, endpoint"
    ):
        parse_config({"pools": {}})


@pytest.mark.parametrize("content", [0, False, [], "text", ["pool"], 1.5])
def test_what_is_no_mapping_is_refused(content: Any) -> None:
    with pytest.raises(UsageError, match="the file must be a mapping"):
        parse_config(content)
    with pytest.raises(UsageError, match="pool must be a mapping"):
        parse_config({"pool": content})


def test_what_is_on_or_off_is_yes_or_no() -> None:
    pool = parse_config({"pool": {"compile": True, "cuda_graphs": False}}).pool
    assert (pool.compile, pool.cuda_graphs) == (True, False)
    for value in (1, "yes", None):
        with pytest.raises(UsageError, match=r"^pool\.compile is .*; it must be bool$"):
            parse_config({"pool": {"compile": value}})


@pytest.mark.parametrize("text", ["", "# only a remark\n", "pool:\nendpoint:\n", "{}", "pool: {}"])
def test_a_file_that_says_nothing_gives_the_defaults(text: str, tmp_path: Path) -> None:
    assert load_config(_written(tmp_path, text)) == Config()


def test_no_file_gives_the_defaults() -> None:
    assert load_config(None) == Config()


@pytest.mark.parametrize("text", ["pool: [", "\tpool: 1", "a: b: c", "!!python/object:os.system {}", "pool: \x01"])
def test_a_file_that_is_no_yaml_is_refused_in_one_line(text: str, tmp_path: Path) -> None:
    path = _written(tmp_path, text)
    with pytest.raises(UsageError, match="is not YAML") as caught:
        load_config(path)
    assert path in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "binary.yaml"
    path.write_bytes(b"pool: \xff\xfe")
    with pytest.raises(UsageError, match="is not YAML"):
        load_config(str(path))


def test_a_file_that_is_not_there_is_told_by_name(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"--config .*nope.yaml: No such file"):
        load_config(str(tmp_path / "nope.yaml"))
    with pytest.raises(UsageError, match="Is a directory"):
        load_config(str(tmp_path))


def test_an_error_in_the_file_names_the_file_and_the_option(tmp_path: Path) -> None:
    path = _written(tmp_path, "endpoint:\n  timeout_s: -2\n")
    with pytest.raises(UsageError, match=r"endpoint\.timeout_s is -2; it must be at least 0") as caught:
        load_config(path)
    assert str(caught.value).startswith(f"--config {path}: ")


def test_the_defaults_come_back_from_a_mapping() -> None:
    assert parse_config(dataclasses.asdict(Config())) == Config()


def test_routes_of_a_container_are_taken_where_the_file_has_none() -> None:
    environment = {"AIP_HEALTH_ROUTE": "/health", "AIP_PREDICT_ROUTE": "/v1/endpoints/1/deployedModels/2:predict"}
    config = with_routes_of_container(parse_config({"endpoint": {"health_route": "/mine"}}), environment)
    assert (config.endpoint.health_route, config.endpoint.predict_route) == ("/mine", environment["AIP_PREDICT_ROUTE"])
    assert with_routes_of_container(Config(), {}) == Config()
    with pytest.raises(UsageError, match="AIP_HEALTH_ROUTE or AIP_PREDICT_ROUTE: health_route is 'no path'"):
        with_routes_of_container(Config(), {"AIP_HEALTH_ROUTE": "no path"})


def test_keys_come_from_the_configuration_a_file_and_the_environment(tmp_path: Path) -> None:
    lines = [str(new_key(name, [Scope.ADMIN])[1]) for name in "abcd"]
    (tmp_path / "keys").write_text(f"# of the team\n\n{lines[1]}\n")
    config = parse_config({"endpoint": {"keys": [lines[0]]}})
    config = with_keys(config, str(tmp_path / "keys"), {"TANDEM_KEYS": f"{lines[2]};{lines[3]}"})
    assert sorted(config.endpoint.keys) == sorted(lines)
    assert with_keys(Config(), None, {}) == Config()


def test_keys_that_cannot_be_are_refused_and_not_repeated(tmp_path: Path) -> None:
    secret, key = new_key("nightly", [Scope.PREDICT])
    (tmp_path / "keys").write_text(f"nightly predict {secret}")
    for path, environment in ((str(tmp_path / "keys"), {}), (None, {"TANDEM_KEYS": secret})):
        with pytest.raises(UsageError, match="a line of a name, scopes and a SHA-256") as caught:
            with_keys(Config(), path, environment)
        assert secret not in str(caught.value)
    with pytest.raises(UsageError, match=r"^endpoint\.the key of 'nightly' has a scope that there is not"):
        parse_config({"endpoint": {"keys": [f"nightly all {key.sha256}"]}})
    with pytest.raises(UsageError, match="--keys /nowhere cannot be read: No such file"):
        with_keys(Config(), "/nowhere", {})


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.1", "example.org", ""])
def test_an_endpoint_that_others_reach_needs_keys_or_a_waiver(host: str) -> None:
    with pytest.raises(UsageError, match="needs keys: make one with tandem key"):
        check_exposure(host, Config(), allow_anonymous=False)
    check_exposure(host, Config(), allow_anonymous=True)
    check_exposure(host, Config(endpoint=EndpointConfig(keys=(_KEY,))), allow_anonymous=False)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.8.0.1", "::1", "localhost"])
def test_an_endpoint_on_loopback_needs_none(host: str) -> None:
    check_exposure(host, Config(), allow_anonymous=False)
