"""What people serve an image classifier with, as their documentation shows it: the peers of `benchmarks/online.py`.

    python benchmarks/online_peers.py fastapi|litserve|ray_serve|ray_serve_two PORT MODEL

Each answers a POST on loopback with the five best classes of an image. `ray_serve_two` has an ingress before the model,
as Tandem has; `ray_serve` has the model behind Serve's proxy at once. With STRETCH in the environment the model runs on
a simulated accelerator, in time that is stretched so.
"""

import io
import os
import sys
from typing import Any

from starlette.requests import Request

from benchmarks.accelerator import simulate

try:
    from litserve import LitAPI  # type: ignore[import-not-found]
except ImportError:  # only the peers' environment has it
    LitAPI = object

BATCH, WAIT_S = 32, 0.01
STRETCH = float(os.environ.get("STRETCH", "0"))


def fastapi(port: int, model: str) -> None:
    """A pipeline of transformers in a FastAPI application, one image at a time in a thread."""
    import uvicorn
    from fastapi import FastAPI, UploadFile
    from PIL import Image
    from transformers import pipeline

    classify: Any = pipeline("image-classification", model=model)
    if STRETCH:
        simulate(classify.model, STRETCH)
    app = FastAPI()

    @app.post("/predict")
    def predict(image: UploadFile) -> Any:
        return classify(Image.open(image.file).convert("RGB"), top_k=5)

    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")


class LitClassifier(LitAPI):  # type: ignore[misc]
    """What LitServe sends, by its name, to a process of its own."""

    def __init__(self, model: str) -> None:
        super().__init__(max_batch_size=BATCH, batch_timeout=WAIT_S)
        self.checkpoint = model

    def setup(self, device: str) -> None:
        self.classifier = Classifier(self.checkpoint)

    def decode_request(self, request: Request) -> Any:
        from PIL import Image

        form: Any = request  # it is annotated so that LitServe reads the form, which is what comes
        return Image.open(io.BytesIO(form["image"].file.read())).convert("RGB")

    def predict(self, images: list[Any]) -> Any:
        return self.classifier(images)

    def encode_response(self, output: Any) -> Any:
        return output


def litserve(port: int, model: str) -> None:
    """LitServe with its own batching."""
    from litserve import LitServer

    server = LitServer(LitClassifier(model), accelerator="cpu")
    server.run(host="127.0.0.1", port=port, log_level="warning", generate_client_file=False)


def ray_serve(port: int, model: str, *, two: bool = False) -> None:
    """Ray Serve with `@serve.batch`; `two` with an ingress deployment before that of the model."""
    import signal

    os.environ["RAY_AUTH_MODE"] = "disabled"  # which Ray reads as it is imported; or it writes a token into the home
    import ray
    from PIL import Image
    from ray import serve

    class Model:
        def __init__(self) -> None:
            self.classifier = Classifier(model)

        @serve.batch(max_batch_size=BATCH, batch_wait_timeout_s=WAIT_S)
        async def classify(self, images: list[Any]) -> list[Any]:
            return list(self.classifier(images))

        async def score(self, body: bytes) -> Any:
            return await self.classify(Image.open(io.BytesIO(body)).convert("RGB"))

        async def __call__(self, request: Request) -> Any:
            return await self.score(await request.body())

    class Ingress:
        def __init__(self, pool: Any) -> None:
            self.pool = pool

        async def __call__(self, request: Request) -> Any:
            return await self.pool.score.remote(await request.body())

    ray.init("local", num_cpus=2, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1")
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    pool: Any = serve.deployment(max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0.5})(Model)
    ingress: Any = serve.deployment(max_ongoing_requests=1000, ray_actor_options={"num_cpus": 0.1})(Ingress)
    serve.run(ingress.bind(pool.bind()) if two else pool.bind())
    signal.pause()


class Classifier:
    """A checkpoint with its processor, as model cards show it."""

    def __init__(self, model: str) -> None:
        import torch
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        self.torch: Any = torch
        self.processor: Any = AutoImageProcessor.from_pretrained(model)
        self.model: Any = AutoModelForImageClassification.from_pretrained(model).eval()
        if STRETCH:
            simulate(self.model, STRETCH)

    def __call__(self, images: list[Any]) -> list[list[dict[str, Any]]]:
        with self.torch.inference_mode():
            scores_NC = self.model(**self.processor(images, return_tensors="pt")).logits.softmax(-1)
        best = scores_NC.topk(5)
        labels = self.model.config.id2label
        return [
            [{"label": labels[int(index)], "score": float(score)} for index, score in zip(indices, scores, strict=True)]
            for indices, scores in zip(best.indices, best.values, strict=True)
        ]


if __name__ == "__main__":
    peer, port, model = sys.argv[1:]
    if peer == "ray_serve_two":
        ray_serve(int(port), model, two=True)
    else:
        {"fastapi": fastapi, "litserve": litserve, "ray_serve": ray_serve}[peer](int(port), model)
