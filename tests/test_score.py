"""`tandem score` against a real server: what it prints, what it gives to a machine, and how it fails."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from deployments.config import EndpointConfig
from deployments.web.app import build_app
from deployments.web.scoring import Image, Scored, Wanted
from jobs.score import score_files
from jobs.screen import Screen
from pipeline.errors import ImageError, JobError
from pipeline.model_info import ModelInfo
from tests.servers import served
from tests.stores import free_ports


class Echo:
    """A scorer whose best class is what the body says; a body of `bad` is a bad image."""

    async def score(self, images: Sequence[Image], wanted: Wanted, within_s: float) -> list[Scored | ImageError]:
        return [self._score(image, range(1, wanted.top_k + 1)) for image in images]

    def _score(self, image: Image, places: range) -> Scored | ImageError:
        assert isinstance(image, bytes)
        if image == b"bad":
            return ImageError("the PNG file is damaged or cut short")
        labels = [f"{image.decode()} {place}" for place in places]
        return Scored([*places], labels, [0.5 / place for place in places], None, "r")

    async def describe(self) -> ModelInfo:
        raise NotImplementedError

    @property
    def info(self) -> ModelInfo:
        raise NotImplementedError


async def another_server(scope: Any, receive: Any, send: Any) -> None:
    """Answers all with what its query says: `status`, and the body `text`."""
    status, text = scope["path"].removesuffix("/predict").strip("/").split("/")
    await send({"type": "http.response.start", "status": int(status), "headers": []})
    await send({"type": "http.response.body", "body": text.encode()})


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    with served(build_app(Echo(), EndpointConfig())) as url:
        yield url


@pytest.fixture
def images(tmp_path: Path) -> Path:
    for name in ("cat", "dog", "bad"):
        (tmp_path / name).write_text(name)
    return tmp_path


class Terminal:
    """A screen whose two streams are kept."""

    def __init__(self, *, as_json: bool = False) -> None:
        self.out, self.err = io.StringIO(), io.StringIO()
        self.screen = Screen(self.out, self.err, as_json=as_json)

    def lines(self) -> list[str]:
        return self.out.getvalue().splitlines()


def test_images_are_listed_with_their_classes(endpoint: str, images: Path) -> None:
    terminal = Terminal()
    files = [str(images / "cat"), str(images / "dog")]
    assert score_files(terminal.screen, files, endpoint, 2)
    assert terminal.lines() == [
        files[0],
        "  0.5000  cat 1",
        "  0.2500  cat 2",
        files[1],
        "  0.5000  dog 1",
        "  0.2500  dog 2",
    ]
    assert terminal.err.getvalue() == ""


def test_a_machine_gets_one_json_document(endpoint: str, images: Path) -> None:
    terminal = Terminal(as_json=True)
    files = [str(images / name) for name in ("cat", "bad", "nope")]
    assert not score_files(terminal.screen, files, endpoint, 1)
    (line,) = terminal.lines()
    assert json.loads(line) == [
        {"image": files[0], "predictions": [{"label": "cat 1", "score": 0.5}]},
        {"image": files[1], "error": "the PNG file is damaged or cut short"},
        {"image": files[2], "error": "No such file or directory"},
    ]


def test_a_bad_image_is_told_why_and_the_others_are_scored(endpoint: str, images: Path) -> None:
    terminal = Terminal()
    assert not score_files(terminal.screen, [str(images / "bad"), str(images / "cat")], endpoint, 1)
    assert terminal.err.getvalue().strip() == "the PNG file is damaged or cut short"
    assert terminal.lines()[-1] == "  0.5000  cat 1"


@pytest.mark.parametrize(("name", "told"), [("nope", "No such file or directory"), (".", "Is a directory")])
def test_a_file_that_cannot_be_read_is_told_and_the_others_are_scored(
    endpoint: str, images: Path, name: str, told: str
) -> None:
    terminal = Terminal()
    assert not score_files(terminal.screen, [str(images / name), str(images / "cat")], endpoint, 1)
    assert terminal.err.getvalue().strip() == told
    assert terminal.lines()[-1] == "  0.5000  cat 1"


def test_a_top_k_that_the_endpoint_refuses_is_told(endpoint: str, images: Path) -> None:
    terminal = Terminal()
    assert not score_files(terminal.screen, [str(images / "cat")], endpoint, 0)
    assert "top_k" in terminal.err.getvalue()


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:{port}", "127.0.0.1:{port}", "ftp://127.0.0.1", "http://[", "http://a:b"]
)
def test_a_url_without_an_endpoint_is_told(images: Path, url: str) -> None:
    url = url.format(port=free_ports(1)[0])
    with pytest.raises(JobError, match="no endpoint answers") as caught:
        score_files(Terminal().screen, [str(images / "cat")], url, 1)
    assert f"--url {url}" in str(caught.value)


@pytest.mark.parametrize("answer", ["200/<html>", "200/{}", "200/[1]", "200/null", "404/<html>", "500/[]", "302/moved"])
def test_another_server_at_the_url_is_told(images: Path, answer: str) -> None:
    terminal = Terminal()
    with served(another_server) as url:
        assert not score_files(terminal.screen, [str(images / "cat")], f"{url}/{answer}", 1)
    assert f"HTTP {answer[:3]}, not the answer of a Tandem endpoint" in terminal.err.getvalue()
