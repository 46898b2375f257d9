"""The form that model cards show: an image by its URL.

    GET /predict_image_class?image_url=https://...

It fetches for a stranger, so it is off unless the configuration lists the hosts that it may fetch from.
"""

from __future__ import annotations

from http import HTTPStatus
from typing import Annotated

from fastapi import APIRouter, Query, Response
from fastapi.responses import JSONResponse

from deployments.web.bodies import documented_answer
from deployments.web.fetch import Fetcher
from deployments.web.own import Answer, TopK
from deployments.web.problems import Problem, answers_in, documented, problem_json
from deployments.web.scoring import REPLICA_HEADER, TOP_K, Service, Wanted

MAX_URL = 4096


def routes(service: Service, fetcher: Fetcher) -> APIRouter:
    """The route of this form."""
    router = APIRouter(tags=["url"], route_class=answers_in(problem_json))

    @router.get(
        "/predict_image_class",
        responses={**documented_answer(Answer), **documented(problem_json, 403, 413, 422, 500, 503, 504)},
    )
    async def predict_image_class(
        image_url: Annotated[str, Query(max_length=MAX_URL)], top_k: TopK = TOP_K
    ) -> Response:
        """Scores the image behind a URL."""
        if not fetcher.hosts:
            detail = (
                "images are not fetched from URLs here: send the image, or have the hosts listed in image_url_hosts"
            )
            raise Problem(HTTPStatus.FORBIDDEN, detail)
        service.check_room()
        (scored,) = await service.score_all([await fetcher.fetch(image_url)], Wanted(top_k=top_k))
        return JSONResponse({"predictions": scored.predictions}, headers={REPLICA_HEADER: scored.replica})

    return router
