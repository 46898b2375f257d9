"""The commands of the endpoint's documentation, run as they stand, beside a real model and without Ray."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from deployments.config import EndpointConfig, parse_config
from deployments.web.app import build_app
from jobs.corpus import digits, encode
from tests.cluster import clean_environment
from tests.local_scorer import LocalScorer
from tests.servers import served

PAGE = (Path(__file__).parent.parent / "deployments" / "web" / "page" / "docs.md").read_text()
COMMANDS = [
    line.removeprefix("$ ")
    for block in re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL)
    for line in block.splitlines()
]
SEVEN = next(digit for digit in digits() if digit.label == 7)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    async def metrics() -> str:
        return "tandem_step_images_count 7\n"

    async def jobs() -> list[dict[str, Any]]:
        return [{"output": "s3://bucket/out"}]

    with served(build_app(LocalScorer(), EndpointConfig(), metrics=metrics, jobs=jobs)) as url:
        yield url


@pytest.fixture(scope="module")
def outputs(url: str, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """What each command prints; they build on each other."""
    folder = tmp_path_factory.mktemp("docs")
    Image.open(BytesIO(encode(SEVEN)[1])).save(folder / "photo.jpg", quality=95)
    (folder / "classify.py").write_text(_here(_file("classify.py"), url))
    return {command: _shell(_here(command, url), folder) for command in COMMANDS}


@pytest.mark.parametrize("command", [one for one in COMMANDS if "127.0.0.1" in one or "classify.py" in one])
def test_each_command_knows_the_seven(command: str, outputs: dict[str, str]) -> None:
    output = outputs[command]
    if command.endswith("/metrics"):
        assert output == "tandem_step_images_count 7\n"
        return
    if command.endswith("/jobs"):
        assert json.loads(output) == {"jobs": [{"output": "s3://bucket/out"}]}
        return
    if command.endswith(("/ping", "/vit-base-patch16-224")):
        assert json.loads(output)  # it is about health, and tells no class
        return
    labels = re.findall(r"(?:\"label\": ?\"|label='|\"classes\": ?\[\"|[.]\d+:\d:)(\d)", output)
    assert labels[0] == "7", output


def test_the_example_of_a_configuration_is_one() -> None:
    assert parse_config(yaml.safe_load(_file("hosts.yaml"))).endpoint.image_url_hosts[1] == "*.example.com"


def _file(name: str) -> str:
    block = re.search(rf"<!-- file: {re.escape(name)} -->\n```[a-z]+\n(.*?)```", PAGE, re.DOTALL)
    assert block is not None
    return block[1]


def _here(text: str, url: str) -> str:
    return text.replace("127.0.0.1:8000", url.removeprefix("http://")).replace("vit-base-patch16-224", "digits-vit")


def _shell(command: str, folder: Path) -> str:
    done = subprocess.run(
        command, shell=True, cwd=folder, env=clean_environment({}), capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, f"{command}: {done.stderr}"
    return done.stdout
