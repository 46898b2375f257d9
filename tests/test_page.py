"""The endpoint's page in a real browser, before a real model and without Ray."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx
import pytest
from playwright.sync_api import Browser, ConsoleMessage, Page, expect

from deployments.config import EndpointConfig
from deployments.web.app import build_app
from deployments.web.keys import Scope, new_key
from jobs.corpus import digits, encode
from tests.browser import chromium
from tests.local_scorer import LocalScorer
from tests.servers import served

SEVEN = encode(next(digit for digit in digits() if digit.label == 7))[1]
THREE = encode(next(digit for digit in digits() if digit.label == 3))[1]
PERCENT = re.compile(r"\d+\.\d %")
NASTY = "<img src=x onerror=alert(1)>.png"


class Pool:
    """A pool's status, as it changes."""

    def __init__(self) -> None:
        self.polls = 0
        self.jobs: list[dict[str, Any]] = []

    async def __call__(self) -> dict[str, Any]:
        self.polls += 1
        lane = {"scored": 100 * self.polls, "backlog": 3}
        return {
            "model": "/models/digits-vit",
            "revision": "r",
            "replicas": [{"replica": "abc123", "busy_s": 0.5 * self.polls, "online": lane, "batch": lane}],
            "requests": {"per_s": 2.5, "p50_ms": 12.3, "p99_ms": None},
            "jobs": self.jobs,
        }


def _job(**changes: Any) -> dict[str, Any]:
    progress = {"phase": "score", "shards": 4, "shards_done": 1, "images": 1234, "errors": 2, "images_per_s": 99.6}
    return {"output": "s3://bucket/out", **progress, "bytes_total": 1000, "bytes_done": 250, **changes}


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as one:
        yield one


@pytest.fixture(scope="module")
def _pool() -> Pool:
    return Pool()


@pytest.fixture
def pool(_pool: Pool) -> Pool:
    _pool.jobs = []
    return _pool


@pytest.fixture(scope="module")
def scorer() -> LocalScorer:
    one = LocalScorer()
    assert one.info.labels  # it is loaded now, not while a browser waits
    return one


@pytest.fixture(scope="module")
def url(scorer: LocalScorer, _pool: Pool) -> Iterator[str]:
    with served(build_app(scorer, EndpointConfig(), status=_pool)) as url:
        yield url


@pytest.fixture
def page(browser: Browser, url: str) -> Iterator[Page]:
    with _page(browser, url) as one:
        yield one


@contextmanager
def _page(browser: Browser, url: str, **options: Any) -> Iterator[Page]:
    """The page, which must ask no other host for anything, and break none of its own rules."""
    context = browser.new_context(base_url=url, **options)
    page = context.new_page()
    asked: list[str] = []
    wrong: list[str] = []

    def hear(message: ConsoleMessage) -> None:
        if message.type == "error" and "Failed to load resource" not in message.text:
            wrong.append(message.text)

    page.on("request", lambda request: asked.append(request.url))
    page.on("console", hear)
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: wrong.append("a dialog"))
    page.goto("/")
    yield page
    context.close()
    assert not wrong
    assert {one.split("/")[2] for one in asked if not one.startswith(("data:", "blob:"))} == {url.split("/")[2]}


def _file(name: str, data: bytes) -> dict[str, Any]:
    return {"name": name, "mimeType": "image/png", "buffer": data}


def test_an_image_that_is_dropped_is_scored(page: Page) -> None:
    drop = page.evaluate_handle(
        """base64 => {
            const bytes = Uint8Array.from(atob(base64), (one) => one.charCodeAt(0));
            const transfer = new DataTransfer();
            transfer.items.add(new File([bytes], "seven.png", { type: "image/png" }));
            return transfer;
        }""",
        base64.b64encode(SEVEN).decode(),
    )
    page.dispatch_event("#drop", "drop", {"dataTransfer": drop})

    result = page.get_by_role("list", name="Scored images").get_by_role("listitem").first
    expect(result.get_by_role("heading", name="seven.png")).to_be_visible()
    best = result.locator("ol li").first
    expect(best.locator("span").first).to_have_text("7")
    expect(best.locator("span").last).to_have_text(PERCENT)
    expect(result.locator("ol li")).to_have_count(5)
    widths = [one.evaluate("bar => bar.getBoundingClientRect().width") for one in result.locator("ol li i").all()]
    assert widths[0] > widths[-1]
    assert widths == sorted(widths, reverse=True)
    assert result.locator("img").evaluate("image => image.decode().then(() => image.naturalWidth, () => 0)") > 0


def test_several_that_are_chosen_are_scored_and_a_bad_one_says_why(page: Page) -> None:
    files = [_file("three.png", THREE), _file(NASTY, b"bad"), _file("seven.png", SEVEN)]
    page.get_by_label("Drop images here, or choose them").set_input_files(files)  # type: ignore[arg-type]

    expect(page.get_by_text("3 scored", exact=True)).to_be_visible()
    results = page.locator("#results > li")
    found = {one.locator("h3").inner_text(): one for one in results.all()}
    assert set(found) == {"three.png", NASTY, "seven.png"}
    expect(found["three.png"].locator("ol li span").first).to_have_text("3")
    expect(found["seven.png"].locator("ol li span").first).to_have_text("7")
    expect(found[NASTY].locator(".error")).to_contain_text("not an image")


def test_it_works_with_the_keyboard_alone(page: Page) -> None:
    page.evaluate("files.addEventListener('click', () => { document.title = 'asked for files'; })")
    focused = []
    for _ in range(4):
        page.keyboard.press("Tab")
        focused.append(page.evaluate("document.activeElement.id || document.activeElement.textContent.trim()"))
        if focused[-1] == "files":
            assert page.locator("#drop").evaluate("drop => getComputedStyle(drop).outlineStyle") == "solid"
            page.keyboard.press("Space")
    assert focused == ["Protocols", "OpenAPI", "files", "API key"]
    expect(page).to_have_title("asked for files")


def test_the_pool_is_shown_as_it_is(page: Page, pool: Pool) -> None:
    row = page.get_by_role("row", name="abc123")
    expect(row.get_by_role("cell").first).to_have_text(re.compile(r"^[1-9]\d* %$"))
    expect(row.get_by_role("cell").nth(1)).to_have_text("3")
    expect(row.get_by_role("cell").nth(3)).to_have_text(re.compile(r"^[1-9]\d*$"))
    expect(page.locator("#numbers")).to_have_text(
        re.compile(r"Replicas\s*1\s*Requests/s\s*2.5\s*p50\s*12.3 ms\s*p99\s*\u2013")
    )
    expect(page.get_by_text("digits-vit", exact=True)).to_be_visible()
    expect(page.get_by_text("None runs.")).to_be_visible()


def test_a_jobs_progress_is_shown_while_it_runs(page: Page, pool: Pool) -> None:
    pool.jobs = [_job()]
    bar = page.get_by_role("progressbar", name="Progress of s3://bucket/out")
    expect(bar).to_have_js_property("value", 0.25)
    expect(page.get_by_text("scores: 1 of 4 shards, 1,234 images, 2 errors, 100/s")).to_be_visible()
    pool.jobs = [_job(bytes_done=750, shards_done=3)]
    expect(bar).to_have_js_property("value", 0.75)
    pool.jobs = []
    expect(page.get_by_text("None runs.")).to_be_visible()


def test_it_asks_for_a_key_where_one_is_needed(browser: Browser, scorer: LocalScorer, pool: Pool) -> None:
    secret, key = new_key("me", [Scope.ADMIN])
    with served(build_app(scorer, EndpointConfig(keys=(str(key),)), status=pool)) as url, _page(browser, url) as page:
        expect(page.get_by_text("a key is needed")).to_be_visible()
        page.get_by_label("Sent with each request from this page").fill(secret)
        expect(page.get_by_role("row", name="abc123")).to_be_visible()
        page.get_by_label("Drop images here").set_input_files(_file("seven.png", SEVEN))  # type: ignore[arg-type]
        expect(page.locator("#results ol li span").first).to_have_text("7")


def test_an_endpoint_that_is_gone_is_told(browser: Browser, scorer: LocalScorer, pool: Pool) -> None:
    with served(build_app(scorer, EndpointConfig(), status=pool)) as url:
        context = browser.new_context(base_url=url)
        page = context.new_page()
        page.goto("/")
        expect(page.get_by_role("row", name="abc123")).to_be_visible()
    expect(page.get_by_text("the endpoint does not answer")).to_be_visible()
    context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("path", ["/", "/docs"])
def test_text_can_be_read_on_its_ground(browser: Browser, url: str, path: str, scheme: str) -> None:
    with _page(browser, url, color_scheme=scheme) as page:
        page.goto(path)
        colors = page.evaluate("['color', 'backgroundColor'].map((name) => getComputedStyle(document.body)[name])")
        text, ground = (_luminance(one) for one in colors)
        assert (ground > text) == (scheme == "light")
        assert (max(text, ground) + 0.05) / (min(text, ground) + 0.05) >= 7  # WCAG AAA


def _luminance(color: str) -> float:
    def linear(part: float) -> float:
        return part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4

    red, green, blue = (linear(int(part) / 255) for part in re.findall(r"\d+", color)[:3])
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def test_it_fits_a_narrow_screen(browser: Browser, url: str) -> None:
    with _page(browser, url, viewport={"width": 320, "height": 640}) as page:
        expect(page.get_by_role("row", name="abc123")).to_be_attached()
        assert page.evaluate("document.documentElement.scrollWidth") <= 320


def test_the_documentation_tells_of_this_endpoint(browser: Browser, url: str) -> None:
    with _page(browser, url) as page:
        page.get_by_role("link", name="Protocols").click()
        expect(page.get_by_role("heading", name="Open Inference Protocol v2")).to_be_visible()
        text = page.locator("main").inner_text()
    assert f"{url.removeprefix('http://')}/v2/models/digits-vit" in text
    assert "127.0.0.1:8000" not in text


@pytest.mark.parametrize("path", ["/", "/docs", "/page.js", "/page.css"])
def test_the_pages_rules_are_strict(url: str, path: str) -> None:
    policy = httpx.get(url + path).headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "frame-ancestors 'none'" in policy


def test_a_hosts_name_cannot_bring_a_script_into_the_documentation(url: str) -> None:
    text = httpx.get(f"{url}/docs", headers={"host": "x<script>alert(1)</script>"}).text
    assert "<script" not in text


def test_without_a_pool_to_watch_there_is_no_status(scorer: LocalScorer) -> None:
    with served(build_app(scorer, EndpointConfig())) as url:
        assert httpx.get(f"{url}/status").status_code == 404
