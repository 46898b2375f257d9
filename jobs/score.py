"""`tandem score`: image files to a running endpoint."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from jobs.screen import Screen
from pipeline.errors import JobError

TIMEOUT_S = 60.0


def score_files(screen: Screen, images: Sequence[str], url: str, top_k: int) -> bool:
    """Scores the files one by one and tells their classes; False where one of them failed.

    Raises `JobError` where no endpoint answers at `url`.
    """
    try:
        with httpx.Client(base_url=url, timeout=TIMEOUT_S, headers=_key()) as client:
            answers = [_score(client, image, top_k) for image in images]
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise JobError(f"--url {url}: no endpoint answers ({error}); start one with tandem serve") from error
    screen.result(answers)
    for answer in answers:
        screen.say(answer["image"])
        for best in answer.get("predictions", ()):
            screen.say(f"  {best['score']:.4f}  {best['label']}")
        if "error" in answer:
            screen.note(f"  {answer['error']}")
    return not any("error" in answer for answer in answers)


def _key() -> dict[str, str]:
    """The header of the caller's key, which is not an option: others on the machine see those."""
    key = os.environ.get("TANDEM_KEY")
    return {"authorization": f"Bearer {key}"} if key else {}


def _score(client: httpx.Client, image: str, top_k: int) -> dict[str, Any]:
    try:
        content = Path(image).read_bytes()
    except OSError as error:
        return {"image": image, "error": error.strerror}
    response = client.post("/predict", params={"top_k": top_k}, content=content)
    try:
        answer = response.json()
        if response.is_success:
            predictions = [{"label": best["label"], "score": best["score"]} for best in answer["predictions"]]
            return {"image": image, "predictions": predictions}
        return {"image": image, "error": answer["detail"]}
    except (ValueError, KeyError, TypeError):
        return {"image": image, "error": f"HTTP {response.status_code}, not the answer of a Tandem endpoint"}
