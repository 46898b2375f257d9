"""Every protocol, spoken by the clients that people have, gives the scores of transformers' pipeline."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import math
import subprocess
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from io import BytesIO
from typing import Any

import httpx
import numpy as np
import pytest
import transformers
import tritonclient.http as triton
import tritonclient.http.aio as triton_aio
from huggingface_hub import InferenceClient
from huggingface_hub.errors import HfHubHTTPError
from PIL import Image
from tritonclient.utils import InferenceServerException

from deployments.config import EndpointConfig
from deployments.web.app import build_app
from deployments.web.scoring import Image as Image_
from deployments.web.scoring import Scored, Wanted
from jobs.corpus import digits, encode
from pipeline.errors import ImageError
from tests.command import MODEL
from tests.local_scorer import LocalScorer
from tests.servers import served

SCORER = cache(LocalScorer)
CONFIG = EndpointConfig(max_images=8, health_route="/health", predict_route="/v1/endpoints/e:predict")
FILES = [encode(digit)[1] for digit in digits()[:8]]
BAD = b"not an image"
CLASSES = 10
NAME = "digits-vit"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served(build_app(SCORER(), CONFIG)) as url:
        yield url


@pytest.fixture(scope="module")
def reference() -> Callable[..., list[dict[str, Any]]]:
    pipeline: Any = transformers.pipeline("image-classification", model=MODEL)

    def classes(file: bytes, top_k: int = 5, function: str | None = None) -> list[dict[str, Any]]:
        options = {} if function is None else {"function_to_apply": function}
        found: list[dict[str, Any]] = pipeline(Image.open(BytesIO(file)).convert("RGB"), top_k=top_k, **options)
        return found

    return classes


Reference = Callable[..., list[dict[str, Any]]]


def _same(found: Any, expected: list[dict[str, Any]]) -> None:
    assert [one["label"] for one in found] == [one["label"] for one in expected]
    np.testing.assert_allclose([one["score"] for one in found], [one["score"] for one in expected], atol=1e-5)


def _text(file: bytes) -> str:
    return base64.b64encode(file).decode()


def _json(url: str, content: Any, **options: Any) -> Any:
    response = httpx.post(url, json=content, **options)
    assert response.status_code == 200, response.text
    return response.json()


def _curl(*arguments: str, body: bytes = b"") -> str:
    done = subprocess.run(
        ["curl", "--fail-with-body", "--silent", "--show-error", *arguments],
        input=body, capture_output=True, timeout=20, check=True,
    )  # fmt: skip
    return done.stdout.decode()


class TestOwn:
    def test_one_image_as_the_body(self, url: str, reference: Reference) -> None:
        told = json.loads(_curl("--data-binary", "@-", f"{url}/predict?top_k=3", body=FILES[0]))
        assert told.keys() == {"predictions"}
        _same(told["predictions"], reference(FILES[0], 3))

    def test_several_as_files_of_a_form(self, url: str, reference: Reference, tmp_path: Any) -> None:
        for number, file in enumerate((*FILES[:2], BAD)):
            (tmp_path / f"{number}.png").write_bytes(file)
        parts = [part for number in range(3) for part in ("--form", f"image=@{tmp_path}/{number}.png")]
        told = json.loads(_curl(*parts, f"{url}/predict"))["results"]
        _same(told[0]["predictions"], reference(FILES[0]))
        _same(told[1]["predictions"], reference(FILES[1]))
        assert told[2].keys() == {"error"}
        assert "not an image" in told[2]["error"]

    def test_several_in_json_in_their_order_with_an_error_for_the_bad_one(self, url: str, reference: Reference) -> None:
        files = [FILES[0], BAD, *FILES[1:4]]
        told = _json(f"{url}/predict", {"images": [_text(file) for file in files], "top_k": 2})["results"]
        assert ["error" in one for one in told] == [False, True, False, False, False]
        for file, one in zip(files, told, strict=True):
            if file != BAD:
                _same(one["predictions"], reference(file, 2))

    def test_a_line_for_each_image_where_lines_are_asked_for(self, url: str, reference: Reference) -> None:
        content = {"images": [_text(FILES[0]), _text(BAD), _text(FILES[1])]}
        response = httpx.post(f"{url}/predict", json=content, headers={"accept": "application/x-ndjson"})
        assert response.headers["content-type"] == "application/x-ndjson"
        first, second, third = map(json.loads, response.text.splitlines())
        _same(first["predictions"], reference(FILES[0]))
        _same(third["predictions"], reference(FILES[1]))
        assert "error" in second

    @pytest.mark.parametrize("function", ["softmax", "sigmoid", "none"])
    def test_functions_are_those_of_the_pipeline(self, url: str, reference: Reference, function: str) -> None:
        told = httpx.post(f"{url}/predict?top_k=10&function_to_apply={function}", content=FILES[2]).json()
        _same(told["predictions"], reference(FILES[2], 10, function))

    def test_the_embedding_is_the_hidden_state_of_transformers(self, url: str) -> None:
        told = httpx.post(f"{url}/predict?embedding=true", content=FILES[0]).json()
        processor: Any = transformers.AutoImageProcessor.from_pretrained(MODEL, backend="pil")
        model = transformers.AutoModelForImageClassification.from_pretrained(MODEL).eval()
        inputs = processor(Image.open(BytesIO(FILES[0])).convert("RGB"), return_tensors="pt")
        hidden = model.vit(**inputs).last_hidden_state[0, 0].detach().numpy()
        np.testing.assert_allclose(told["embedding"], hidden, atol=1e-5)

    def test_a_compressed_body_is_unpacked(self, url: str, reference: Reference) -> None:
        response = httpx.post(f"{url}/predict", content=gzip.compress(FILES[0]), headers={"content-encoding": "gzip"})
        _same(response.json()["predictions"], reference(FILES[0]))


class TestHuggingFace:
    def test_the_client_as_it_comes(self, url: str, reference: Reference) -> None:
        found = InferenceClient(model=url).image_classification(FILES[0])
        _same(found, reference(FILES[0]))

    def test_the_client_with_options(self, url: str, reference: Reference) -> None:
        found = InferenceClient(model=url).image_classification(FILES[1], top_k=2, function_to_apply="sigmoid")
        _same(found, reference(FILES[1], 2, "sigmoid"))

    def test_the_client_that_names_the_model(self, url: str, reference: Reference) -> None:
        _same(InferenceClient(model=f"{url}/models/{NAME}").image_classification(FILES[0]), reference(FILES[0]))

    def test_the_client_is_told_what_is_wrong(self, url: str) -> None:
        with pytest.raises(HfHubHTTPError, match="not an image") as caught:
            InferenceClient(model=url).image_classification(BAD)
        assert caught.value.response.json().keys() == {"error"}
        with pytest.raises(HfHubHTTPError, match="no model 'other/model' is served here; there is 'digits-vit'"):
            InferenceClient(model=f"{url}/models/other/model").image_classification(FILES[0])


def _files_tensor(files: list[bytes], *, binary: bool = True) -> triton.InferInput:
    tensor = triton.InferInput("image", [len(files)], "BYTES")
    tensor.set_data_from_numpy(np.array(files, object), binary_data=binary)
    return tensor


class TestOpenInferenceProtocol:
    @pytest.fixture
    def client(self, url: str) -> Iterator[triton.InferenceServerClient]:
        client = triton.InferenceServerClient(url.removeprefix("http://"))
        yield client
        client.close()

    def test_health_and_metadata(self, client: triton.InferenceServerClient) -> None:
        assert client.is_server_live()
        assert client.is_server_ready()
        assert client.is_model_ready(NAME)
        assert client.is_model_ready(NAME, "1")
        assert not client.is_model_ready("other")
        assert not client.is_model_ready(NAME, "2")
        assert client.get_server_metadata()["name"] == "tandem"
        told = client.get_model_metadata(NAME)
        assert (told["name"], told["versions"]) == (NAME, ["1"])
        assert {"name": "image", "datatype": "BYTES", "shape": [-1]} in told["inputs"]
        assert {"name": "scores", "datatype": "FP32", "shape": [-1, CLASSES]} in told["outputs"]

    @pytest.mark.parametrize("version", ["", "1"])
    def test_files_as_binary_data(
        self, client: triton.InferenceServerClient, reference: Reference, version: str
    ) -> None:
        found = client.infer(NAME, [_files_tensor(FILES[:3])], version, request_id="seven")
        assert found.get_response()["id"] == "seven"
        scores_NC = found.as_numpy("scores")
        assert scores_NC.shape == (3, CLASSES)
        for file, scores_C, label in zip(FILES, scores_NC, found.as_numpy("label"), strict=False):
            best = reference(file, CLASSES)
            assert label.decode() == best[0]["label"]
            np.testing.assert_allclose(
                [scores_C[int(one["label"])] for one in best], [one["score"] for one in best], atol=1e-5
            )

    def test_the_same_in_compressed_requests_and_responses(self, client: triton.InferenceServerClient) -> None:
        plain = client.infer(NAME, [_files_tensor(FILES[:2])])
        for encoding in ("gzip", "deflate"):
            packed = client.infer(NAME, [_files_tensor(FILES[:2])], request_compression_algorithm=encoding)
            np.testing.assert_array_equal(packed.as_numpy("scores"), plain.as_numpy("scores"))

    @pytest.mark.parametrize("binary", [True, False])
    def test_pixels_are_scored_as_their_file_is(self, client: triton.InferenceServerClient, binary: bool) -> None:
        pixels_NHWC = np.stack([np.asarray(Image.open(BytesIO(file)).convert("RGB")) for file in FILES[:2]])
        tensor = triton.InferInput("pixels", list(pixels_NHWC.shape), "UINT8")
        tensor.set_data_from_numpy(pixels_NHWC, binary_data=binary)
        outputs = [triton.InferRequestedOutput("scores", binary_data=binary)]
        found = client.infer(NAME, [tensor], outputs=outputs)
        files = client.infer(NAME, [_files_tensor(FILES[:2])])
        np.testing.assert_allclose(found.as_numpy("scores"), files.as_numpy("scores"), atol=1e-6)

    @pytest.mark.parametrize("binary", [True, False])
    def test_the_classification_extension(
        self, client: triton.InferenceServerClient, reference: Reference, binary: bool
    ) -> None:
        outputs = [triton.InferRequestedOutput("scores", class_count=3, binary_data=binary)]
        found = client.infer(NAME, [_files_tensor(FILES[:2])], outputs=outputs).as_numpy("scores")
        assert found.shape == (2, 3)
        for file, row in zip(FILES, found, strict=False):
            told = [(element.decode() if binary else element).split(":") for element in row]
            expected = reference(file, 3)
            assert [label for _, _, label in told] == [one["label"] for one in expected]
            assert [index for _, index, _ in told] == [one["label"] for one in expected]  # of digits, they are the same
            np.testing.assert_allclose(
                [float(score) for score, _, _ in told], [one["score"] for one in expected], atol=1e-5
            )

    def test_the_embedding_where_it_is_asked_for(self, client: triton.InferenceServerClient, url: str) -> None:
        outputs = [triton.InferRequestedOutput("embedding")]
        found = client.infer(NAME, [_files_tensor(FILES[:1])], outputs=outputs).as_numpy("embedding")
        told = httpx.post(f"{url}/predict?embedding=true", content=FILES[0]).json()["embedding"]
        np.testing.assert_allclose(found, [told], atol=1e-6)

    def test_a_request_brings_its_own_deadline(self, client: triton.InferenceServerClient) -> None:
        client.infer(NAME, [_files_tensor(FILES[:1])], timeout=1_500_000)
        assert SCORER().asked[-1] == 1.5

    def test_what_is_wrong_is_told(self, client: triton.InferenceServerClient) -> None:
        with pytest.raises(InferenceServerException, match=r"image 1 \(of 2, from 0\): not an image"):
            client.infer(NAME, [_files_tensor([FILES[0], BAD])])
        with pytest.raises(InferenceServerException, match="no model 'other' is served here"):
            client.infer("other", [_files_tensor(FILES[:1])])
        with pytest.raises(InferenceServerException, match="there is no output 'logits'"):
            client.infer(NAME, [_files_tensor(FILES[:1])], outputs=[triton.InferRequestedOutput("logits")])
        with pytest.raises(InferenceServerException, match="9 images, and a request may have 8"):
            client.infer(NAME, [_files_tensor([FILES[0]] * 9)])
        other = triton.InferInput("pixel_values", [1, 2], "FP32")
        other.set_data_from_numpy(np.zeros((1, 2), np.float32))
        with pytest.raises(InferenceServerException, match="the inputs are pixel_values; send one: 'image'"):
            client.infer(NAME, [other])

    @pytest.mark.parametrize("shape", [[10**9, 0, 1, 3], [10**9, 1, 0, 3]])
    def test_images_without_pixels_cost_nothing_however_many(self, url: str, shape: list[int]) -> None:
        pixels = {"name": "pixels", "datatype": "UINT8", "shape": shape, "data": []}
        response = httpx.post(f"{url}/v2/models/{NAME}/infer", json={"inputs": [pixels]})
        assert (response.status_code, "a request may have 8" in response.json()["error"]) == (413, True)

    @pytest.mark.parametrize(
        ("tensor", "told"),
        [
            ({"datatype": "INT64", "data": [1]}, "is of INT64; send BYTES or UINT8"),
            ({"data": ["?"]}, "has data that does not fit: not base64"),
            ({"data": "MQ=="}, "has no data, which is to be a list"),
            ({"shape": [2], "data": ["MQ=="]}, "has 1 elements for the shape [2]"),
            ({"shape": [-1], "data": ["MQ=="]}, "with a size below 0"),
            ({"parameters": {"binary_data_size": 9}}, "has a binary_data_size of 9, and 0 bytes are left"),
            ({"parameters": {"shared_memory_region": "r"}}, "is in shared memory"),
            ({"name": "pixels", "datatype": "UINT8", "shape": [1, 1, 1, 3], "data": [1, 2, 300]}, "from 0 to 255"),
            ({"name": "pixels", "datatype": "UINT8", "shape": [1, 1, 1, 3], "data": [1, 2, 0.5]}, "whole numbers"),
            ({"name": "pixels", "datatype": "UINT8", "shape": [1, 1, 1, 3], "data": [1, 2, -1e300]}, "whole numbers"),
            ({"name": "pixels", "datatype": "UINT8", "shape": [1, 1, 1, 3], "data": [1, 2, 10**30]}, "one shape"),
            ({"name": "pixels", "datatype": "UINT8", "shape": [1, 1, 1, 3], "data": [[1], [2, 3]]}, "does not fit"),
            ({"name": "pixels", "datatype": "UINT8", "shape": [1, 3], "data": [1, 2, 3]}, "must be UINT8 [N, H, W, 3]"),
            ({"name": "image", "datatype": "UINT8", "shape": [1], "data": [1]}, "must be BYTES [N]"),
        ],
    )
    def test_a_tensor_that_cannot_be_is_told_why(self, url: str, tensor: dict[str, Any], told: str) -> None:
        image = {"name": "image", "datatype": "BYTES", "shape": [1], **tensor}
        response = httpx.post(f"{url}/v2/models/{NAME}/infer", json={"inputs": [image]})
        assert (response.status_code, response.json().keys()) == (400, {"error"}), response.text
        assert told in response.json()["error"]

    def test_binary_data_that_does_not_add_up_is_told(self, url: str) -> None:
        image = {"name": "image", "datatype": "BYTES", "shape": [1], "parameters": {"binary_data_size": 6}}
        text = json.dumps({"inputs": [image]}).encode()
        for length, data, told in (
            (str(len(text)), b"\x09\0\0\0ab", "ends within an element"),
            (str(len(text)), b"\x02\0\0\0abmore", "4 bytes of the body belong to no input"),
            (str(len(text)), b"\x02\0", "has a binary_data_size of 6, and 2 bytes are left"),
            (str(len(text) + 99), b"", "it must be a number, at most the body's"),
            ("many", b"", "it must be a number"),
        ):
            headers = {"inference-header-content-length": length}
            response = httpx.post(f"{url}/v2/models/{NAME}/infer", content=text + data, headers=headers)
            assert (response.status_code, told in response.json()["error"]) == (400, True), response.text

    def test_the_asynchronous_client(self, url: str) -> None:
        async def test() -> None:
            async with triton_aio.InferenceServerClient(url.removeprefix("http://")) as client:
                assert await client.is_server_live()
                assert await client.is_model_ready(NAME)
                found = await client.infer(NAME, [_files_tensor(FILES[:2], binary=True)])
                assert found.as_numpy("scores").shape == (2, CLASSES)
                with pytest.raises(InferenceServerException, match="not an image"):
                    await client.infer(NAME, [_files_tensor([BAD])])

        asyncio.run(test())

    def test_files_in_json_are_base64(self, url: str, reference: Reference) -> None:
        image = {"name": "image", "datatype": "BYTES", "shape": [1, 1], "data": [[_text(FILES[0])]]}
        told = _json(f"{url}/v2/models/{NAME}/infer", {"inputs": [image], "outputs": [{"name": "label"}]})
        assert told["outputs"] == [
            {"name": "label", "datatype": "BYTES", "shape": [1], "data": [reference(FILES[0], 1)[0]["label"]]}
        ]


class TestTensorFlowServing:
    """The shapes are those of its REST reference."""

    def test_status(self, url: str) -> None:
        for path in (NAME, f"{NAME}/versions/1"):
            told = httpx.get(f"{url}/v1/models/{path}").json()
            assert told == {
                "model_version_status": [
                    {"version": "1", "state": "AVAILABLE", "status": {"error_code": "OK", "error_message": ""}}
                ]
            }

    def test_rows(self, url: str, reference: Reference) -> None:
        instances = [{"b64": _text(FILES[0])}, {"image_bytes": {"b64": _text(FILES[1])}}]
        body = json.dumps({"signature_name": "serving_default", "instances": instances}).encode()
        told = json.loads(_curl("--data", "@-", f"{url}/v1/models/{NAME}:predict", body=body))
        assert told.keys() == {"predictions"}
        for file, one in zip(FILES, told["predictions"], strict=False):
            _same(
                [{"label": a, "score": b} for a, b in zip(one["classes"], one["scores"], strict=True)], reference(file)
            )

    @pytest.mark.parametrize("inputs", [lambda images: images, lambda images: {"image_bytes": images}])
    def test_columns(self, url: str, reference: Reference, inputs: Callable[[Any], Any]) -> None:
        images = [{"b64": _text(file)} for file in FILES[:2]]
        told = _json(f"{url}/v1/models/{NAME}/versions/1:predict", {"inputs": inputs(images)})
        assert told.keys() == {"outputs"}
        assert told["outputs"]["classes"] == [[one["label"] for one in reference(file)] for file in FILES[:2]]

    def test_classify(self, url: str, reference: Reference) -> None:
        told = _json(f"{url}/v1/models/{NAME}:classify", {"examples": [{"image": {"b64": _text(FILES[0])}}]})
        (pairs,) = told["results"]
        _same([{"label": label, "score": score} for label, score in pairs], reference(FILES[0]))

    def test_what_is_wrong_is_told(self, url: str) -> None:
        predict = f"{url}/v1/models/{NAME}:predict"
        one = {"b64": _text(FILES[0])}
        for path, content, status, told in (
            (predict, {"instances": [{"b64": "?"}]}, 422, "instances.0: Value error, not base64"),
            (predict, {"instances": [{"b64": _text(BAD)}]}, 422, "not an image"),
            (predict, {"instances": [one], "inputs": [one]}, 422, "one of instances and inputs"),
            (predict, {}, 422, "one of instances and inputs"),
            (predict, {"instances": [one], "signature_name": "other"}, 404, "no signature 'other'"),
            (f"{url}/v1/models/other:predict", {"instances": [one]}, 404, "no model 'other'"),
            (f"{url}/v1/models/{NAME}/versions/2:predict", {"instances": [one]}, 404, "no version '2'"),
        ):
            response = httpx.post(path, json=content)
            assert (response.status_code, response.json().keys()) == (status, {"error"}), response.text
            assert told in response.json()["error"]


class TestContainers:
    """The shapes are those of Vertex AI's and SageMaker's contracts."""

    def test_vertex(self, url: str, reference: Reference) -> None:
        assert httpx.get(f"{url}/health").status_code == 200
        content = {"instances": [{"b64": _text(FILES[0])}, {"b64": _text(BAD)}], "parameters": {"top_k": 2}}
        good, bad = _json(f"{url}/v1/endpoints/e:predict", content)["predictions"]
        _same(good, reference(FILES[0], 2))
        assert "not an image" in bad["error"]
        assert _json(f"{url}/v1/endpoints/e:predict", {"instances": [], "parameters": None}) == {"predictions": []}

    def test_its_routes_are_there_only_where_they_are_named(self) -> None:
        paths = build_app(SCORER(), EndpointConfig()).openapi()["paths"]
        assert "/ping" in paths
        assert "/health" not in paths

    @pytest.mark.parametrize("kind", ["image/png", "application/x-image", "application/octet-stream"])
    def test_sagemaker_with_an_image(self, url: str, reference: Reference, kind: str) -> None:
        assert httpx.get(f"{url}/ping").status_code == 200
        response = httpx.post(f"{url}/invocations", content=FILES[0], headers={"content-type": kind})
        _same(response.json(), reference(FILES[0]))

    def test_sagemaker_with_json(self, url: str, reference: Reference) -> None:
        task = {"inputs": _text(FILES[0]), "parameters": {"top_k": 1, "function_to_apply": "none"}}
        _same(_json(f"{url}/invocations", task), reference(FILES[0], 1, "none"))
        told = _json(f"{url}/invocations", {"instances": [{"b64": _text(FILES[1])}]})
        _same(told["predictions"][0], reference(FILES[1]))


class Broken(LocalScorer):
    """Gives scores that are no numbers."""

    async def score(self, images: Sequence[Image_], wanted: Wanted, within_s: float) -> list[Scored | ImageError]:
        return [Scored([0, 1], ["a", "b"], [math.nan, math.nan], None, "replica") for _ in images]


@pytest.mark.parametrize(
    ("path", "content", "media"),
    [
        ("/predict", FILES[0], "image/png"),
        ("/predict", {"images": [_text(FILES[0])] * 2}, "application/json"),
        ("/", FILES[0], "image/png"),
        ("/", {"inputs": _text(FILES[0])}, "application/json"),
        (f"/v1/models/{NAME}:predict", {"instances": [{"b64": _text(FILES[0])}]}, "application/json"),
        (f"/v1/models/{NAME}:classify", {"examples": [{"b64": _text(FILES[0])}]}, "application/json"),
        (
            f"/v2/models/{NAME}/infer",
            {"inputs": [{"name": "image", "datatype": "BYTES", "shape": [1], "data": [_text(FILES[0])]}]},
            "application/json",
        ),
        ("/invocations", FILES[0], "image/png"),
        ("/v1/endpoints/e:predict", {"instances": [{"b64": _text(FILES[0])}]}, "application/json"),
    ],
)
def test_scores_that_are_no_numbers_are_a_failure_in_each_protocols_shape(path: str, content: Any, media: str) -> None:
    body = content if isinstance(content, bytes) else json.dumps(content).encode()
    with served(build_app(Broken(), CONFIG)) as url:
        response = httpx.post(f"{url}{path}", content=body, headers={"content-type": media})

    assert response.status_code == 500
    answer = response.json()
    assert "not finite" in answer["detail" if path == "/predict" else "error"]
