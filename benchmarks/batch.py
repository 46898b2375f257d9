"""A batch of JPEG files, scored by Tandem, by what people would take instead, and by the model alone.

    python benchmarks/batch.py                 # writes results; half an hour on 2 cores
    python benchmarks/batch.py --quick --json  # under 5 minutes; one JSON object as the last line

Every contender is a process that is started first and stays; then they take turns, in each round with a few images and
with many. In the steady state an image costs what the further ones cost: (many - few) / (their seconds - the others').
What is left of the few is the start of a job: actors, the model where a peer loads it anew, the plan, the report. The
same files, the same checkpoint and dtype; the answers of all are compared with those of the torch loop.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # it runs as a script

from benchmarks.contender import Answers, Contender, started
from benchmarks.photos import link_photos, write_checkpoint, write_photos
from benchmarks.results import write_results

HERE = Path(__file__).parent
PEERS = ("loop", "pipeline", "daft", "ray_template")
BOUNDS = ("model_alone", "limit")
ALL = ("tandem", *PEERS, *BOUNDS)
ARRANGEMENTS = ("threads", "processes")
REFERENCE = "loop"
PHOTOS_FOR_HEAD = 60
BUCKET = "photos"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--few", type=int, default=250, help="images of a round's short runs")
    parser.add_argument("--many", type=int, default=1000, help="images of a round's long runs")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"))
    parser.add_argument("--only", nargs="+", default=ALL, choices=ALL, help="these alone; nothing is written")
    parser.add_argument("--s3", action="store_true", help="Tandem also from Ceph's radosgw, which must be installed")
    parser.add_argument("--quick", action="store_true", help="one round of 64 and 256 images; nothing is written")
    parser.add_argument("--json", action="store_true", help="one JSON object as the last line")
    options = parser.parse_args()
    if options.quick:
        options.rounds, options.few, options.many = 1, 64, 256
    with tempfile.TemporaryDirectory() as folder:
        runs = measure(Path(folder), options)
    results = {name: summary(rounds, options.few, options.many) for name, rounds in runs.items()}
    brief = {name: results[best_of(name, results)]["images_per_s"] for name in names_of(results)}
    print(table(results))
    if not options.quick and options.only == ALL:
        settings = {name: getattr(options, name) for name in ("rounds", "few", "many", "dtype")}
        write_results("batch", {**settings, "images_per_s": brief, "contenders": results})
    if options.json:
        print(json.dumps({"images_per_s": brief, "startup_s": results.get("tandem", {}).get("startup_s")}))


def measure(folder: Path, options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Of every contender its rounds."""
    few, many, model = folder / "few", folder / "many", folder / "model"
    write_photos(many, options.many)
    link_photos(many, few, options.few)
    write_checkpoint(model, sorted(few.iterdir())[:PHOTOS_FOR_HEAD])
    with ExitStack() as stack:
        if options.s3:
            stack.enter_context(in_s3(folder, few, many))
        arrangements = ARRANGEMENTS[:1] if options.quick else ARRANGEMENTS
        contenders = {
            name: stack.enter_context(started(name, command, folder))
            for name, command in commands(str(model), options.dtype, arrangements).items()
            if name.partition(":")[0] in options.only
        }
        runs: dict[str, list[dict[str, Any]]] = {name: [] for name in contenders}
        if options.s3 and "tandem" in contenders:
            contenders["tandem_s3"], runs["tandem_s3"] = contenders["tandem"], []
        warm = {name: warmed(contender, name, few) for name, contender in contenders.items()}
        for name, answers in warm.items():
            print(f"{name}: {compared(answers, warm.get(REFERENCE, {}))}", file=sys.stderr)
        for number in range(options.rounds):
            for name in rotated(list(runs), number):
                one = {size: contenders[name].run(place(name, size, few, many)) for size in ("few", "many")}
                runs[name].append(one)
                print(name, {size: round(told["seconds"], 2) for size, told in one.items()}, file=sys.stderr)
    return runs


def commands(model: str, dtype: str, arrangements: tuple[str, ...]) -> dict[str, list[str]]:
    """How each contender is started."""
    own, peers = str(HERE / "batch_own.py"), str(HERE / "batch_peers.py")
    found = {"tandem": [sys.executable, own, "tandem", model, dtype]}
    found |= {name: [sys.executable, peers, name, model, dtype] for name in PEERS}
    for name in BOUNDS:
        found |= {f"{name}:{how}": [sys.executable, own, name, model, dtype, how] for how in arrangements}
    return found


def place(name: str, size: str, few: Path, many: Path) -> str:
    """What a contender is to score."""
    return f"s3://{BUCKET}/{size}" if name == "tandem_s3" else str(few if size == "few" else many)


def warmed(contender: Contender, name: str, few: Path) -> Answers:
    """The answers of a first run, which is not measured."""
    answers: Answers = contender.run(place(name, "few", few, few))["answers"]
    if name.partition(":")[0] != "model_alone":
        assert len(answers) == len(os.listdir(few)), f"{name} scored {len(answers)} images"
    return answers


def compared(answers: Answers, reference: Answers) -> str:
    """How far the answers are those of the reference."""
    both = [(answers[name], reference[name]) for name in answers if name in reference]
    if not both:
        return "nothing to compare"
    same = sum(one[0] == other[0] for one, other in both)
    apart = max((abs(one[1] - other[1]) for one, other in both if one[0] == other[0]), default=0.0)
    return f"{same} of {len(both)} labels as the loop's, scores within {apart:.1g}"


@contextmanager
def in_s3(folder: Path, few: Path, many: Path) -> Iterator[None]:
    """The same files in a store, which the environment of what is started meanwhile leads to."""
    from tests.stores import Radosgw, environment

    store = Radosgw(folder / "store")
    try:
        store.start()
        os.environ.update(environment(store.port))
        import boto3

        client = boto3.client("s3")
        client.create_bucket(Bucket=BUCKET)
        for size, source in (("few", few), ("many", many)):
            for photo in source.iterdir():
                client.upload_file(str(photo), BUCKET, f"{size}/{photo.name}")
        yield
    finally:
        store.stop()


def rotated(names: list[str], by: int) -> list[str]:
    """The names, from another one on in each round."""
    start = by % len(names)
    return names[start:] + names[:start]


def summary(rounds: list[dict[str, Any]], few: int, many: int) -> dict[str, Any]:
    """Medians, and the range of the rates."""
    rates = [(many - few) / (one["many"]["seconds"] - one["few"]["seconds"]) for one in rounds]
    cpu_ms = [(one["many"]["cpu_s"] - one["few"]["cpu_s"]) / (many - few) * 1e3 for one in rounds]
    firsts = [one["few"]["startup_s"] for one in rounds if "startup_s" in one["few"]]
    return {
        "images_per_s": round(statistics.median(rates), 1),
        "range": [round(min(rates), 1), round(max(rates), 1)],
        "whole_s": round(statistics.median(one["many"]["seconds"] for one in rounds), 2),
        "cpu_ms_per_image": round(statistics.median(cpu_ms), 2),
        "startup_s": round(statistics.median(firsts), 2) if firsts else None,
        "rounds": [{size: without_answers(told) for size, told in one.items()} for one in rounds],
    }


def without_answers(told: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in told.items() if name != "answers"}


def names_of(results: dict[str, Any]) -> list[str]:
    """The contenders, whatever their arrangement."""
    return list(dict.fromkeys(name.partition(":")[0] for name in results))


def best_of(name: str, results: dict[str, Any]) -> str:
    """The arrangement of a contender that was fastest."""
    return max((one for one in results if one.partition(":")[0] == name), key=lambda one: results[one]["images_per_s"])


def table(results: dict[str, dict[str, Any]]) -> str:
    """A line for each, for people."""
    lines = [f"{'':22} {'images/s':>9} {'range':>15} {'whole job s':>12} {'CPU ms':>8} {'first chunk s':>14}"]
    for name, one in results.items():
        low, high = one["range"]
        lines.append(
            f"{name:22} {one['images_per_s']:>9} {f'{low} - {high}':>15} {one['whole_s']:>12} "
            f"{one['cpu_ms_per_image']:>8} {one['startup_s'] or '':>14}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
