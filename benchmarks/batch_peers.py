"""What people score a folder of images with, as documentation shows it: the peers of `benchmarks/batch.py`.

    python benchmarks/batch_peers.py loop|pipeline|ray_template|daft MODEL DTYPE

Each uses all cores as well as its documentation says how to.
"""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # it runs as a script

from benchmarks.contender import Answers, Done, answer_runs

BATCH = 32
CORES = os.cpu_count() or 1


def loop(model: str, dtype: str) -> Callable[[str], Done]:
    """A loop of torch: a DataLoader whose workers decode and run the processor, and the model in this process."""
    import torch
    from PIL import Image
    from torch.utils.data import DataLoader, Dataset

    classify = Classifier(model, dtype)

    class Images(Dataset):  # type: ignore[type-arg]
        def __init__(self, folder: str) -> None:
            self.paths = sorted(Path(folder).iterdir())

        def __len__(self) -> int:
            return len(self.paths)

        def __getitem__(self, index: int) -> Any:
            path = self.paths[index]
            return path.name, classify.processor(Image.open(path), return_tensors="pt")["pixel_values"][0]

    def collate(samples: list[Any]) -> Any:
        names, pixels = zip(*samples, strict=True)
        return names, torch.stack(pixels)

    def run(folder: str) -> Done:
        answers: Answers = {}
        for names, pixels in DataLoader(Images(folder), batch_size=BATCH, num_workers=CORES, collate_fn=collate):
            answers |= dict(zip(names, classify.score(pixels), strict=True))
        return Done(answers)

    return run


def pipeline(model: str, dtype: str) -> Callable[[str], Done]:
    """transformers' own, with batches and workers."""
    import torch
    import transformers
    from torch.utils.data import Dataset

    class Paths(Dataset):  # type: ignore[type-arg]
        """It takes a list's images one batch after another, without workers, and a data set's with them."""

        def __init__(self, paths: list[str]) -> None:
            self.paths = paths

        def __len__(self) -> int:
            return len(self.paths)

        def __getitem__(self, index: int) -> str:
            return self.paths[index]

    classify: Any = transformers.pipeline(
        "image-classification", model=model, dtype=getattr(torch, dtype), batch_size=BATCH, num_workers=CORES, top_k=1
    )

    def run(folder: str) -> Done:
        paths = sorted(map(str, Path(folder).iterdir()))
        found = classify(Paths(paths))
        return Done(
            {Path(path).name: (best["label"], best["score"]) for path, (best,) in zip(paths, found, strict=True)}
        )

    return run


def ray_template(model: str, dtype: str) -> Callable[[str], Done]:
    """Ray Data: `read_images`, and `map_batches` with an actor that runs the processor and the model."""
    os.environ["RAY_AUTH_MODE"] = "disabled"  # which Ray reads as it is imported; or it writes a token into the home
    import ray
    import torch

    ray.init(
        "local", num_cpus=CORES, include_dashboard=False, log_to_driver=False, _node_ip_address="127.0.0.1",
        object_store_memory=2 << 30,
    )  # fmt: skip
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False

    class Score:
        def __init__(self) -> None:
            torch.set_num_threads(CORES)  # Ray would give it one, as it asks for one CPU
            self.classify = Classifier(model, dtype)

        def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
            found = self.classify.score(self.classify.pixels(list(batch["image"])))
            labels, scores = zip(*found, strict=True)
            return {"path": batch["path"], "label": list(labels), "score": list(scores)}

    def run(folder: str) -> Done:
        images = ray.data.read_images(folder, mode="RGB", include_paths=True)
        scored = images.map_batches(Score, batch_size=BATCH, compute=ray.data.ActorPoolStrategy(size=1))
        return Done({Path(row["path"]).name: (row["label"], row["score"]) for row in scored.iter_rows()})

    return run


def daft(model: str, dtype: str) -> Callable[[str], Done]:
    """Daft: `download`, `decode_image`, and a batched function that runs the processor and the model."""
    import daft
    from daft import DataType, col
    from daft.functions import decode_image, download
    from transformers import AutoImageProcessor, AutoModelForImageClassification  # noqa: F401  # threads would race

    @daft.cls
    class Score:
        def __init__(self) -> None:
            self.classify = Classifier(model, dtype)

        @daft.method.batch(
            return_dtype=DataType.struct({"label": DataType.string(), "score": DataType.float64()}), batch_size=BATCH
        )
        def __call__(self, images: Any) -> list[dict[str, Any]]:
            found = self.classify.score(self.classify.pixels(images.to_pylist()))
            return [{"label": label, "score": score} for label, score in found]

    score: Any = Score()

    def run(folder: str) -> Done:
        files = daft.from_glob_path(f"{folder}/*.jpg")
        scored = files.select("path", score(decode_image(download(col("path")), mode="RGB")).alias("best"))
        return Done(
            {Path(row["path"]).name: (row["best"]["label"], row["best"]["score"]) for row in scored.iter_rows()}
        )

    return run


class Classifier:
    """A checkpoint with its processor, as model cards show it."""

    def __init__(self, model: str, dtype: str) -> None:
        import torch
        from transformers import AutoImageProcessor, AutoModelForImageClassification

        self.torch: Any = torch
        self.dtype = getattr(torch, dtype)
        self.processor: Any = AutoImageProcessor.from_pretrained(model)
        self.model: Any = AutoModelForImageClassification.from_pretrained(model, dtype=self.dtype).eval()

    def pixels(self, images: list[Any]) -> Any:
        return self.processor(images, return_tensors="pt")["pixel_values"]

    def score(self, pixels: Any) -> list[tuple[str, float]]:
        with self.torch.inference_mode():
            best = self.model(pixels.to(self.dtype)).logits.float().softmax(-1).max(-1)
        labels = self.model.config.id2label
        return [
            (labels[index], score) for index, score in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        ]


if __name__ == "__main__":
    peer, model, dtype = sys.argv[1:]
    peers = {"loop": loop, "pipeline": pipeline, "ray_template": ray_template, "daft": daft}
    answer_runs(peers[peer](model, dtype))
