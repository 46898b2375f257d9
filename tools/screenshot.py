"""Makes docs/page.png: the page of an endpoint that runs here, while a job does.

tandem serve --model jobs/models/digits-vit &
python tools/screenshot.py http://127.0.0.1:8000
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # it runs as a script

from playwright.sync_api import expect

from jobs.corpus import digits, encode, write_shards
from jobs.models import shipped
from tests.browser import chromium

ROOT = Path(__file__).resolve().parents[1]
COPIES = 20
WAIT_MS = 120_000


def main(url: str) -> None:
    chosen = {digit.label: digit for digit in reversed(digits()) if digit.held_out}
    files = [
        {"name": f"{digit.key}.png", "mimeType": "image/png", "buffer": encode(digit)[1]}
        for digit in (chosen[7], chosen[3], chosen[8])
    ]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, chromium() as browser:
        for copy in range(COPIES):
            write_shards(Path(folder) / "photos" / f"{copy:02}")
        tandem = Path(sys.executable).parent / "tandem"
        command = [tandem, "submit", f"{folder}/photos", f"{folder}/scores", "--model", shipped("digits-vit"), "--wait"]
        with subprocess.Popen(command) as job:
            page = browser.new_page(viewport={"width": 1100, "height": 700}, device_scale_factor=1.5)
            page.goto(url)
            expect(page.locator("#list")).to_contain_text("scores: 1", timeout=WAIT_MS)
            page.locator("#files").set_input_files(files)  # type: ignore[arg-type]
            expect(page.get_by_text("3 scored", exact=True)).to_be_visible()
            page.wait_for_timeout(3000)
            page.screenshot(path=ROOT / "docs" / "page.png")
            job.terminate()


if __name__ == "__main__":
    main(sys.argv[1])
