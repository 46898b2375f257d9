"""Logits, scores and their order are those of transformers, and a checkpoint that cannot be scored with is refused.

The weights are random or trained here; the loading code, the configurations and the images are real.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import socket
import subprocess
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForImageClassification,
    ConvNextImageProcessor,
    ResNetConfig,
    ResNetForImageClassification,
    ViTConfig,
    ViTForImageClassification,
    ViTImageProcessor,
    ViTModel,
)
from transformers.image_utils import load_image

from jobs.models import shipped
from pipeline.checkpoint import find_checkpoint
from pipeline.decode import decode_image
from pipeline.errors import ModelError
from pipeline.model import Classifier
from pipeline.model_info import Dtype
from tests.images import real_images

CIFAR = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
SHA = "0123456789abcdef0123456789abcdef01234567"
ENOUGH = 2  # images for a large model
_PROCESSOR: Callable[..., Any] = transformers.AutoImageProcessor.from_pretrained


@pytest.fixture(scope="session", autouse=True)
def _two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def _small_vit(**options: Any) -> ViTConfig:
    labels = dict(enumerate(CIFAR))
    return ViTConfig(
        hidden_size=48,
        num_hidden_layers=2,
        num_attention_heads=3,
        intermediate_size=96,
        image_size=32,
        patch_size=8,
        initializer_range=0.3,  # spreads the scores, so that their order is clear
        **{"id2label": labels, "label2id": {label: index for index, label in labels.items()}, **options},
    )


def _save(folder: Path, network: Any, processor: Any) -> Path:
    network.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def vit_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ViT-B/16 with 1,000 labels, as google/vit-base-patch16-224 is configured."""
    torch.manual_seed(0)
    config = ViTConfig(id2label={index: f"class {index}" for index in range(1000)}, initializer_range=0.05)
    return _save(tmp_path_factory.mktemp("vit-base"), ViTForImageClassification(config), ViTImageProcessor())


@pytest.fixture(scope="session")
def resnet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ResNet-50 with a processor as microsoft/resnet-50 has, and batch statistics that do something."""
    torch.manual_seed(1)
    network = ResNetForImageClassification(ResNetConfig(id2label={index: f"class {index}" for index in range(1000)}))
    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.running_mean, -0.2, 0.2)  # type: ignore[arg-type]
            torch.nn.init.uniform_(module.running_var, 0.5, 2.0)  # type: ignore[arg-type]
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    processor = ConvNextImageProcessor(
        size={"shortest_edge": 224}, crop_pct=0.875, resample=3, image_mean=mean, image_std=std
    )
    return _save(tmp_path_factory.mktemp("resnet"), network, processor)


@pytest.fixture(scope="session")
def cifar(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small ViT with a head of CIFAR-10's labels."""
    torch.manual_seed(2)
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    return _save(tmp_path_factory.mktemp("cifar"), ViTForImageClassification(_small_vit()), processor)


@pytest.fixture
def broken(cifar: Path, tmp_path: Path) -> Path:
    """A copy of the small checkpoint, to be broken."""
    return Path(shutil.copytree(cifar, tmp_path / "broken"))


@pytest.fixture(params=["vit_base", "resnet", "cifar", "digits"])
def checkpoint(request: pytest.FixtureRequest) -> Path:
    return shipped("digits-vit") if request.param == "digits" else request.getfixturevalue(request.param)


def _classifier(folder: Path, dtype: Dtype = "float32") -> Classifier:
    return Classifier(find_checkpoint(str(folder)), device="cpu", dtype=dtype)


def _images(checkpoint: Path) -> dict[str, bytes]:
    """All real images for a small model, a spread of them for a large one."""
    names = [name for name in real_images() if name != "no_time_for_that_tiny.gif"]
    small = os.path.getsize(checkpoint / "model.safetensors") < 10 << 20
    return {name: real_images()[name] for name in (names if small else names[:: len(names) // ENOUGH][:ENOUGH])}


def _pixels(classifier: Classifier, files: dict[str, bytes]) -> np.ndarray:
    return np.stack([decode_image(file, classifier.info.transform) for file in files.values()])


def _loaded(file: bytes) -> Image.Image:
    with warnings.catch_warnings(action="ignore"):  # Pillow warns of a palette with transparency
        return load_image(Image.open(io.BytesIO(file)))


def test_logits_are_those_of_transformers(checkpoint: Path) -> None:
    classifier, files = _classifier(checkpoint), _images(checkpoint)
    network = AutoModelForImageClassification.from_pretrained(checkpoint)
    inputs = _PROCESSOR(checkpoint, backend="pil")([_loaded(file) for file in files.values()], return_tensors="pt")
    with torch.no_grad():
        expected_NC = network(**inputs).logits
        actual_NC = classifier.logits(torch.from_numpy(_pixels(classifier, files)))
    assert expected_NC.std() > 0.01, "the model says something"
    torch.testing.assert_close(actual_NC, expected_NC, rtol=0, atol=1e-4)


def test_labels_and_scores_are_those_of_the_pipeline_in_its_order(checkpoint: Path) -> None:
    _check_scores(checkpoint, _images(checkpoint), 5)


@pytest.mark.parametrize("top_k", [1, 10, 2000])
def test_top_k_is_that_of_the_pipeline(cifar: Path, top_k: int) -> None:
    _check_scores(cifar, _images(cifar), top_k)


def _check_scores(checkpoint: Path, files: dict[str, bytes], top_k: int) -> None:
    classifier = _classifier(checkpoint)
    build: Callable[..., Any] = transformers.pipeline
    network = AutoModelForImageClassification.from_pretrained(checkpoint)
    pipe = build("image-classification", network, image_processor=_PROCESSOR(checkpoint, backend="pil"))
    scores = classifier.score(_pixels(classifier, files), top_k)
    for row, (name, file) in enumerate(files.items()):
        if name == "jpeg-corrupted-exif":
            continue  # the pipeline turns an image upright again, and fails on these tags then
        expected = pipe(_loaded(file), top_k=top_k)
        _check_order([classifier.info.labels[index] for index in scores.top_NK[row]], expected)
        np.testing.assert_allclose(scores.scores_NK[row], [one["score"] for one in expected], atol=1e-5)


def _check_order(labels: list[str], expected: list[dict[str, Any]]) -> None:
    """Equal order; neighbours may change places where float rounding alone tells them apart."""
    known = {one["label"]: one["score"] for one in expected}
    assert len(labels) == len(set(labels)) == len(expected)
    for label, one in zip(labels, expected, strict=True):
        assert label == one["label"] or abs(known.get(label, one["score"]) - one["score"]) < 1e-6


@pytest.mark.parametrize(
    "options",
    [
        {"problem_type": "multi_label_classification"},
        {"problem_type": "single_label_classification"},
        {"problem_type": "regression"},
        {"id2label": {0: "only one"}, "label2id": {"only one": 0}},
        {"id2label": {0: "only one"}, "label2id": {"only one": 0}, "problem_type": "regression"},
    ],
)
def test_logits_become_scores_as_in_the_pipeline(options: dict[str, Any], tmp_path: Path) -> None:
    torch.manual_seed(3)
    processor = ViTImageProcessor(size={"height": 32, "width": 32})
    folder = _save(tmp_path, ViTForImageClassification(_small_vit(**options)), processor)
    _check_scores(folder, {"cat": real_images()["chelsea.png"]}, 10)


def test_equal_scores_are_in_the_order_of_their_classes(broken: Path) -> None:
    weights = load_file(broken / "model.safetensors")
    for name in ("classifier.weight", "classifier.bias"):
        weights[name] = torch.zeros_like(weights[name])
    save_file(weights, broken / "model.safetensors", {"format": "pt"})
    scores = _classifier(broken).score(np.zeros((1, 32, 32, 3), np.uint8), 10)
    assert scores.top_NK.tolist() == [list(range(10))]


@pytest.mark.parametrize(("name", "threads"), [("digits", 1), ("cifar", 1), ("resnet", os.cpu_count())])
def test_a_small_model_leaves_the_other_cores_to_others(
    name: str, threads: int, request: pytest.FixtureRequest
) -> None:
    folder = shipped("digits-vit") if name == "digits" else request.getfixturevalue(name)
    assert Classifier(find_checkpoint(str(folder))).suitable_threads == threads


def test_details_are_the_logits_and_what_the_last_layer_makes_them_of(checkpoint: Path) -> None:
    classifier = _classifier(checkpoint)
    pixels_NHWC = _pixels(classifier, _images(checkpoint))[:3]

    found = classifier.score(pixels_NHWC, 1, details=True)

    assert found.logits_NC is not None
    assert found.embeddings_ND is not None
    assert found.embeddings_ND.shape == (len(pixels_NHWC), classifier.info.embedding_size)
    with torch.inference_mode():
        np.testing.assert_array_equal(found.logits_NC, classifier.logits(torch.from_numpy(pixels_NHWC)).numpy())
    weights = load_file(checkpoint / "model.safetensors")
    name = next(name for name in weights if name.startswith("classifier") and name.endswith("weight"))
    head, bias = weights[name].numpy(), weights[name.replace("weight", "bias")].numpy()
    np.testing.assert_allclose(found.embeddings_ND @ head.T + bias, found.logits_NC, atol=1e-4)
    assert classifier.score(pixels_NHWC, 1).logits_NC is None


def test_top_k_above_the_number_of_classes_gives_all_of_them(cifar: Path) -> None:
    scores = _classifier(cifar).score(np.zeros((3, 32, 32, 3), np.uint8), 11)
    assert scores.top_NK.shape == scores.scores_NK.shape == (3, 10)
    assert (str(scores.top_NK.dtype), str(scores.scores_NK.dtype)) == ("int32", "float32")
    np.testing.assert_allclose(scores.scores_NK.sum(axis=1), 1.0, rtol=1e-5)


def test_a_batch_gives_what_its_images_give_alone(cifar: Path) -> None:
    classifier = _classifier(cifar)
    images_NHWC = _pixels(classifier, _images(cifar))
    together = classifier.score(images_NHWC, 10)
    for row, image_HWC in enumerate(images_NHWC):
        alone = classifier.score(image_HWC[None], 10)
        assert together.top_NK[row].tolist() == alone.top_NK[0].tolist()
        np.testing.assert_allclose(together.scores_NK[row], alone.scores_NK[0], atol=1e-5)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_step_that_cores_share_gives_what_one_core_gives(threads: int, cifar: Path) -> None:
    alone, shared = _classifier(cifar), _classifier(cifar)
    shared.use_threads(threads)
    images_NHWC = np.resize(_pixels(alone, _images(cifar)), (33, 32, 32, 3))
    for count in (1, 2, 3, 4, 7, 16, 17, 33):
        expected = alone.score(images_NHWC[:count], 3, details=True)
        found = shared.launch([images_NHWC[:1], images_NHWC[1:count]], 3, details=True)()
        assert found.top_NK.tolist() == expected.top_NK.tolist()
        np.testing.assert_allclose(found.scores_NK, expected.scores_NK, atol=1e-5)
        np.testing.assert_allclose(found.logits_NC, expected.logits_NC, atol=1e-4)  # type: ignore[arg-type]
        np.testing.assert_allclose(found.embeddings_ND, expected.embeddings_ND, atol=1e-4)  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_lower_precision_runs_and_agrees_within_it(dtype: Dtype) -> None:
    folder = shipped("digits-vit")
    full, lower = _classifier(folder), _classifier(folder, dtype)
    images_NHWC = _pixels(full, _images(folder))
    expected, actual = full.score(images_NHWC, 1), lower.score(images_NHWC, 1)
    assert lower.info.dtype == dtype
    assert str(actual.scores_NK.dtype) == "float32"
    np.testing.assert_allclose(actual.scores_NK, expected.scores_NK, atol=0.1)


def test_a_model_tells_what_it_is(cifar: Path) -> None:
    info = _classifier(cifar).info
    assert info.labels == CIFAR
    assert (info.model, info.dtype) == (str(cifar), "float32")
    assert (info.transform.height, info.transform.width) == (32, 32)
    assert info.versions.keys() == {"torch", "transformers", "pillow"}


def test_what_a_model_tells_is_read_without_loading_torch(cifar: Path) -> None:
    read = "import pickle, sys; pickle.load(sys.stdin.buffer); print('torch' in sys.modules)"
    told = subprocess.run(
        [sys.executable, "-c", read], input=pickle.dumps(_classifier(cifar).info), capture_output=True, check=True
    )
    assert told.stdout.strip() == b"False"


def test_a_model_that_fails_on_its_own_images_is_refused_when_warmed(broken: Path) -> None:
    _edit(broken / "preprocessor_config.json", size={"height": 48, "width": 48})
    with pytest.raises(ModelError, match="fails on a step of 2 images of 48 x 48 pixels on cpu: ") as caught:
        _classifier(broken).warm(2)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("device", ["cuda:99", "no-such-device"])
def test_a_device_that_is_not_there_is_refused(cifar: Path, device: str) -> None:
    with pytest.raises(ModelError, match=f"device '{device}' cannot be used here: .+") as caught:
        Classifier(find_checkpoint(str(cifar)), device=device)
    assert "\n" not in str(caught.value)


def _edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def _rewrite_weights(folder: Path, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> None:
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})


def _headless(folder: Path) -> None:
    ViTModel(_small_vit(), add_pooling_layer=False).save_pretrained(folder)


def _without_one_layer(folder: Path) -> None:
    _rewrite_weights(folder, lambda weights: {name: value for name, value in weights.items() if "layer.1." not in name})


def _cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _other_size(folder: Path) -> None:
    _rewrite_weights(folder, lambda weights: weights | {"classifier.weight": torch.zeros(7, 48)})


_BREAKS: dict[str, Callable[[Path], object]] = {
    "no config": lambda folder: (folder / "config.json").unlink(),
    "no weights": lambda folder: (folder / "model.safetensors").unlink(),
    "no processor": lambda folder: (folder / "preprocessor_config.json").unlink(),
    "no head": _headless,
    "a layer is missing": _without_one_layer,
    "a head of another size": _other_size,
    "weights cut off": _cut,
    "weights are text": lambda folder: (folder / "model.safetensors").write_text("version https://git-lfs..."),
    "weights are empty": lambda folder: (folder / "model.safetensors").write_bytes(b""),
    "config is no JSON": lambda folder: (folder / "config.json").write_text("{"),
    "config is a list": lambda folder: (folder / "config.json").write_text("[]"),
    "config is of no kind": lambda folder: (folder / "config.json").write_text("{}"),
    "config of an unknown kind": lambda folder: _edit(folder / "config.json", model_type="no-such-model"),
    "config of a language model": lambda folder: _edit(folder / "config.json", model_type="gpt2"),
    "config of nonsense": lambda folder: _edit(folder / "config.json", hidden_size="wide"),
    "labels with a gap": lambda folder: _edit(folder / "config.json", id2label={str(2 * n): str(n) for n in range(10)}),
    "processor of an unknown kind": lambda folder: _edit(
        folder / "preprocessor_config.json", image_processor_type="NoSuchProcessor"
    ),
}


@pytest.mark.filterwarnings("ignore")  # what libraries warn of on the way to their error
@pytest.mark.parametrize("damage", _BREAKS.values(), ids=_BREAKS.keys())
def test_a_broken_checkpoint_is_refused_in_one_line_that_names_it(broken: Path, damage: Callable[[Path], Any]) -> None:
    damage(broken)
    with pytest.raises(ModelError) as caught:
        _classifier(broken)
    assert str(broken) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_pickle_is_never_loaded(broken: Path) -> None:
    proof = broken / "executed"
    torch.save(load_file(broken / "model.safetensors"), broken / "pytorch_model.bin")
    (broken / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors"):
        _classifier(broken)
    (broken / "pytorch_model.bin").write_bytes(f"cos\nsystem\n(S'touch {proof}'\ntR.".encode())
    with pytest.raises(ModelError):
        _classifier(broken)
    assert not proof.exists()


@pytest.mark.parametrize("known", [True, False], ids=["beside a known model type", "of its own model type"])
def test_code_in_a_checkpoint_is_never_executed(broken: Path, known: bool) -> None:
    proof = broken / "executed"
    code = f"open({str(proof)!r}, 'w').close()\nraise SystemExit\n"
    for name in ("configuration_own", "modeling_own", "processing_own"):
        (broken / f"{name}.py").write_text(code)
    own = {"AutoConfig": "configuration_own.C", "AutoModelForImageClassification": "modeling_own.M"}
    _edit(broken / "config.json", auto_map=own, model_type="vit" if known else "own")
    _edit(broken / "preprocessor_config.json", auto_map={"AutoImageProcessor": "processing_own.P"})
    if known:
        assert _classifier(broken).info.labels == CIFAR
    else:
        with pytest.raises(ModelError):
            _classifier(broken)
    assert not proof.exists()


@pytest.mark.parametrize("name", ["./nope", "/nope/x", "~/nope/x", "~nobody-here/x", "a/b/c", "org/na--me", ""])
def test_what_is_neither_a_folder_nor_a_hub_id_is_refused(name: str) -> None:
    with pytest.raises(ModelError, match="no such folder") as caught:
        find_checkpoint(name)
    assert type(caught.value) is ModelError
    assert repr(name) in str(caught.value)


def test_the_revision_of_a_folder_changes_with_each_of_its_files(broken: Path) -> None:
    (broken / "unrelated.txt").write_text("not of the model")
    seen = {find_checkpoint(str(broken)).revision}
    (broken / "unrelated.txt").write_text("still not")
    assert {find_checkpoint(str(broken)).revision} == seen
    for name in ("config.json", "preprocessor_config.json", "model.safetensors"):
        content = bytearray((broken / name).read_bytes())
        content[-2] ^= 1
        (broken / name).write_bytes(content)
        seen.add(find_checkpoint(str(broken)).revision)
    (broken / "processor_config.json").write_text("{}")
    seen.add(find_checkpoint(str(broken)).revision)
    assert len(seen) == 5


def test_the_revision_of_a_folder_is_that_of_its_copy(broken: Path, cifar: Path) -> None:
    assert find_checkpoint(str(broken)).revision == find_checkpoint(str(cifar)).revision


def _find(name: str, **environment: str) -> tuple[list[str], float]:
    """What `find_checkpoint` gives in a process of its own, as the hub's client reads its environment once."""
    code = """
import sys
import pipeline.checkpoint
from pipeline.checkpoint import find_checkpoint
from pipeline.errors import ModelError
pipeline.checkpoint.HUB_TIMEOUT_S = 1.0
try:
    found = find_checkpoint(sys.argv[1])
    print("found", found.name, found.path, found.revision, sep="\\n")
except ModelError as error:
    print(type(error).__name__, error, sep="\\n")
"""
    started = time.monotonic()
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE_"))}
    done = subprocess.run(
        [sys.executable, "-c", code, name],
        env=kept | environment,
        capture_output=True,
        text=True,
        check=True,
        timeout=60,
    )
    return done.stdout.splitlines(), time.monotonic() - started


@pytest.fixture
def hub_cache(cifar: Path, tmp_path: Path) -> Path:
    """A Hugging Face home with `org/name` in its cache, as a download leaves it."""
    model = tmp_path / "hub" / "models--org--name"
    shutil.copytree(cifar, model / "snapshots" / SHA)
    (model / "refs").mkdir()
    for branch in ("main", "v1"):
        (model / "refs" / branch).write_text(SHA)
    return tmp_path


@pytest.mark.parametrize(
    "environment", [{"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}], ids=["unreachable", "offline"]
)
@pytest.mark.parametrize("name", ["org/name", "org/name@v1", f"org/name@{SHA}"])
def test_a_model_in_the_cache_needs_no_hub(hub_cache: Path, name: str, environment: dict[str, str]) -> None:
    answer, _ = _find(name, HF_HOME=str(hub_cache), **environment)
    assert answer == ["found", name, str(hub_cache / "hub" / "models--org--name" / "snapshots" / SHA), SHA]


def test_a_model_from_the_cache_scores(hub_cache: Path) -> None:
    assert _classifier(hub_cache / "hub" / "models--org--name" / "snapshots" / SHA).info.labels == CIFAR


@pytest.mark.parametrize(
    "environment", [{"HF_ENDPOINT": "http://127.0.0.1:9"}, {"HF_HUB_OFFLINE": "1"}], ids=["unreachable", "offline"]
)
@pytest.mark.parametrize("name", ["org/other", "org/name@v2", "nope"])
def test_a_hub_that_does_not_answer_is_told_in_seconds(hub_cache: Path, name: str, environment: dict[str, str]) -> None:
    (kind, message), seconds = _find(name, HF_HOME=str(hub_cache), **environment)
    assert kind == "HubUnreachable"
    assert repr(name) in message
    assert seconds < 15


def test_a_hub_that_hangs_is_given_up(hub_cache: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        for name, kind in (("org/other", "HubUnreachable"), ("org/name", "found")):
            assert _find(name, HF_HOME=str(hub_cache), HF_ENDPOINT=endpoint)[0][0] == kind


def _overflowing(folder: Path) -> None:
    """Activations that float32 holds, and float16 does not."""

    def change(weights: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        (found,) = [key for key in weights if ".0." in key and ("fc1.weight" in key or "intermediate.dense.w" in key)]
        return weights | {found: weights[found] * 3e5}

    _rewrite_weights(folder, change)


def test_a_model_whose_scores_are_no_numbers_is_refused_when_warmed(broken: Path) -> None:
    _overflowing(broken)
    _classifier(broken).warm(2)
    with pytest.raises(ModelError, match="not finite in float16: use dtype float32"):
        _classifier(broken, "float16").warm(2)


@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification", "regression"])
def test_scores_of_an_image_with_an_infinite_logit_are_no_numbers(
    broken: Path, problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    _edit(broken / "config.json", problem_type=problem)
    classifier = _classifier(broken)
    height, width = classifier.info.transform.height, classifier.info.transform.width
    logits_NC = torch.zeros(2, len(classifier.info.labels))
    logits_NC[1, 3] = torch.inf
    monkeypatch.setattr(classifier, "logits", lambda images_NHWC: logits_NC)
    classifier._here.embeddings_ND = torch.zeros(2, classifier.info.embedding_size or 1)

    scores = classifier.score(np.zeros((2, height, width, 3), np.uint8), 2)

    assert scores.finite_N.tolist() == [True, False]
    assert np.isnan(scores.scores_NK[1]).all()
