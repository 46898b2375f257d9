"""What a driver makes of its receipts."""

from __future__ import annotations

import pytest

from jobs.receipts import IMAGES_FOR_SHARE, Progress, Receipt, Tally
from pipeline.errors import JobError


def receipt(rows: int, errors: int, *, replica: str = "a", example: str = "") -> Receipt:
    return Receipt(
        shard=0, chunk=0, last=True, rows=rows, errors=errors, bytes=10 * rows, read_s=1.0, decode_s=2.0, score_s=3.0,
        stage_s=4.0, replica=replica, example=example,
    )  # fmt: skip


def tally(*receipts: Receipt) -> Tally:
    total = Tally()
    for one in receipts:
        total.add(one)
    return total


def test_a_tally_is_the_sum_of_its_receipts() -> None:
    total = tally(receipt(10, 1), receipt(20, 0, replica="b"), receipt(5, 5, replica=""))
    assert (total.images, total.errors, total.bytes, total.chunks) == (35, 6, 350, 3)
    assert dict(total.replicas) == {"a": 9, "b": 20}
    assert dict(total.stage_seconds) == {"read": 3.0, "decode": 6.0, "score": 9.0, "stage": 12.0}


@pytest.mark.parametrize(
    ("images", "errors", "share", "stops"),
    [
        (5000, 50, 0.01, False),
        (5000, 51, 0.01, True),
        (256, 3, 0.01, False),  # more than 1 %, but of too few to tell
        (256, 11, 0.01, True),  # more than 1 % of a thousand
        (5000, 5000, None, False),
        (5000, 0, 0.0, False),
        (1, 1, 0.0, True),
    ],
)
def test_a_share_of_errors_is_judged_over_enough_images(
    images: int, errors: int, share: float | None, stops: bool
) -> None:
    total = tally(receipt(images, errors, example="not an image"))
    if stops:
        with pytest.raises(JobError, match=r"images failed.*\(the first: not an image\)"):
            total.check_errors(share)
    else:
        total.check_errors(share)


def test_at_the_end_it_is_judged_over_what_there_was() -> None:
    total = tally(receipt(256, 3))
    total.check_errors(0.01)
    with pytest.raises(JobError, match=r"3 of 256 images failed, more than --max-error-share 0\.01"):
        total.check_errors(0.01, at_least=0)
    assert total.images < IMAGES_FOR_SHARE


def test_progress_tells_its_rate() -> None:
    assert Progress(phase="score", images=500, run_images=100, elapsed_s=4.0).images_per_s == 25.0
    assert Progress(phase="pool").images_per_s == 0.0
    assert Progress(phase="score", images=1, run_images=1, elapsed_s=3.0).to_dict()["images_per_s"] == 0.3
