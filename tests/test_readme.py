"""The README's examples, run as they stand."""

from __future__ import annotations

import json
import re
import subprocess
from dataclasses import fields
from pathlib import Path

import pytest
import yaml
from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessor

from deployments.config import EndpointConfig, PoolConfig, parse_config
from pipeline import s3
from pipeline.storage import open_store
from tests.cluster import OPEN, clean_environment, ray_cluster
from tests.command import tandem
from tests.conftest import Demo, lead_to_store
from tests.corpora import tar_of
from tests.images import real_images
from tests.stores import Radosgw, environment, free_ports

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_local_example_works_after_the_demo(demo: Demo, state: dict[str, str]) -> None:
    outputs = [_shell(command, demo.folder, state) for command in _commands("local")]

    assert "1,797 images in 10 shards" in outputs[0]
    assert "[1797 rows x" in outputs[1]


@pytest.mark.ray
def test_the_production_example_works_on_a_cluster(
    tmp_path: Path, radosgw: Radosgw, monkeypatch: pytest.MonkeyPatch
) -> None:
    images = {name: data for name, data in real_images().items() if name.endswith(".jpg")}
    _fill_bucket(radosgw, monkeypatch, images)
    (tmp_path / "photo.jpg").write_bytes(next(iter(images.values())))
    (tmp_path / "pool.yaml").write_text(_file("pool.yaml"))
    (port,) = free_ports(1)
    variables = {**OPEN, **environment(radosgw.port), **_hub_cache(tmp_path / "hub", "google/vit-base-patch16-224")}

    with ray_cluster(tmp_path, variables) as cluster:
        replaced = {"http://head:8265": cluster.address, "http://127.0.0.1:8000": f"http://127.0.0.1:{port}"}
        outputs = []
        for command in _commands("cluster"):
            for old, new in replaced.items():
                command = command.replace(old, new)
            if " serve " in command:
                command += f" --port {port}"
            if " score " in command:
                command += f" --url http://127.0.0.1:{port}"
            outputs.append(_shell(command, tmp_path, variables))

    served, submitted, curled, scored, read = outputs
    assert f"answers at http://127.0.0.1:{port}" in served
    assert f"{len(images)} images in 1 shards" in submitted
    best = json.loads(curled)["predictions"]
    assert len(best) == 3
    assert f"{best[0]['score']:.4f}  {best[0]['label']}" in scored
    assert "key: string" in read


def test_the_example_of_a_configuration_is_one() -> None:
    assert parse_config(yaml.safe_load(_file("pool.yaml"))).endpoint.timeout_s == 10


@pytest.mark.parametrize("command", ["demo", "serve", "submit", "key", "score"])
def test_the_readme_lists_every_option(command: str) -> None:
    listed = README.partition("## Commands")[2]
    helped = tandem(command, "--help").out

    options = set(re.findall(r"--[a-z-]+", helped)) - {"--help"}

    section = re.search(rf"tandem {command} .*?(?=tandem [a-z]+  |Exit codes)", listed, re.DOTALL)
    assert section is not None
    assert set(re.findall(r"--[a-z-]+", section[0])) == options


def test_every_configuration_option_is_documented_with_its_default() -> None:
    _, pool, endpoint = (ROOT / "docs" / "configuration.md").read_text().split("\n## ", 2)
    for kind, section in ((PoolConfig, pool), (EndpointConfig, endpoint)):
        for option in fields(kind):
            row = re.search(rf"\| `{option.name}` \| (.*?) \|", section)
            assert row is not None, option.name
            if isinstance(option.default, int | float):
                assert yaml.safe_load(row[1]) == option.default, option.name


def _commands(group: str) -> list[str]:
    blocks = re.findall(rf"<!-- run: {group} -->\n```console\n(.*?)```", README, re.DOTALL)
    return [line.removeprefix("$ ") for block in blocks for line in block.splitlines()]


def _file(name: str) -> str:
    block = re.search(rf"<!-- file: {re.escape(name)} -->\n```yaml\n(.*?)```", README, re.DOTALL)
    assert block is not None
    return block[1]


def _shell(command: str, folder: Path, variables: dict[str, str]) -> str:
    done = subprocess.run(
        command, shell=True, cwd=folder, env=clean_environment(variables), capture_output=True, text=True, timeout=170
    )
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout


def _fill_bucket(radosgw: Radosgw, monkeypatch: pytest.MonkeyPatch, images: dict[str, bytes]) -> None:
    lead_to_store(monkeypatch, radosgw.port)
    s3._client().create_bucket(Bucket="my-bucket")
    open_store("s3://my-bucket/photos").write("a.tar", tar_of(images))
    s3._client.cache_clear()


def _hub_cache(home: Path, model: str) -> dict[str, str]:
    """A Hugging Face cache with random weights for `model`, and the environment that makes it the only source."""
    cache = home / "hub" / f"models--{model.replace('/', '--')}"
    commit = "3f49326eb077187dfe1c2a2bb15fbd74e6ab91e3"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text(commit)
    config = ViTConfig(id2label={index: f"class {index}" for index in range(1000)})
    ViTForImageClassification(config).save_pretrained(cache / "snapshots" / commit)
    ViTImageProcessor().save_pretrained(cache / "snapshots" / commit)
    return {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}
