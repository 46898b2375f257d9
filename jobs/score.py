"""`tandem score`: image files to a running endpoint."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import httpx

from jobs.screen import Screen
from pipeline.errors import JobError

TIMEOUT_S = 60.0


def score_files(screen: Screen, images: Sequence[str], url: str, top_k: int) -> bool:
    """Scores the files one by one and tells their classes; False where one of them failed.

    Raises `JobError` where nothing answers at `url`.
    """
    with httpx.Client(base_url=url, timeout=TIMEOUT_S) as client:
        answers = [_score(client, image, top_k) for image in images]
    screen.result(answers)
    for answer in answers:
        screen.say(answer["image"])
        for best in answer.get("predictions", ()):
            screen.say(f"  {best['score']:.4f}  {best['label']}")
        if "error" in answer:
            screen.note(f"  {answer['error']}")
    return not any("error" in answer for answer in answers)


def _score(client: httpx.Client, image: str, top_k: int) -> dict[str, Any]:
    try:
        response = client.post("/predict", params={"top_k": top_k}, content=Path(image).read_bytes())
    except OSError as error:
        return {"image": image, "error": error.strerror}
    except httpx.HTTPError as error:
        raise JobError(
            f"--url {client.base_url}: no endpoint answers ({error}); start one with tandem serve"
        ) from error
    if response.is_success:
        return {"image": image, "predictions": response.json()}
    try:
        return {"image": image, "error": response.json()["detail"]}
    except (ValueError, KeyError, TypeError):
        return {"image": image, "error": f"HTTP {response.status_code}"}
