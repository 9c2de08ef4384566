"""The report in a real browser: it fits every window, asks for nothing, and runs nothing."""

import html
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from softlabel.pipeline.evaluation.report.page import to_html
from softlabel.pipeline.evaluation.standings import Gap
from tests.pipeline.evaluation.test_report import HOSTILE, report, student

CHROMIUM = shutil.which("chromium")
pytestmark = [pytest.mark.long, pytest.mark.skipif(CHROMIUM is None, reason="needs Chromium")]

_MEASURE = """
<iframe id="page" style="width: {width}px; height: 900px; border: 0" srcdoc="{page}"></iframe><pre id="found"></pre>
<script>
addEventListener("load", () => {{
  const frame = document.getElementById("page").contentWindow, root = frame.document.documentElement
  const found = {{
    overflow: root.scrollWidth - root.clientWidth,
    requests: frame.performance.getEntriesByType("resource").map(entry => entry.name),
    scripts: frame.document.scripts.length,
    ran: frame.alerted === true,
    background: frame.getComputedStyle(frame.document.body).backgroundColor,
  }}
  document.getElementById("found").textContent = JSON.stringify(found)
}})
</script>
"""


@pytest.mark.parametrize("width", [360, 768, 1400])
@pytest.mark.parametrize("dark", [True, False])
def test_the_page_fits_asks_for_nothing_and_runs_nothing(width: int, dark: bool, tmp_path: Path):
    students = [student(HOSTILE, 1.5), student("an-unusually-long-name-of-a-student-that-does-not-end", 2.0)]
    page = to_html(report(*students, student("control", 3.0), gap=Gap("control", None)))
    frame = tmp_path / "frame.html"
    frame.write_text(_MEASURE.format(width=width, page=html.escape(page.replace("alert(", "window.alerted = (true"))))
    flags = ["--headless", "--no-sandbox", "--disable-gpu", "--virtual-time-budget=3000", "--dump-dom"]
    flags += ["--enable-logging=stderr", "--window-size=1600,1000", f"--user-data-dir={tmp_path / 'profile'}"]
    flags += ["--blink-settings=preferredColorScheme=0"] if dark else ["--blink-settings=preferredColorScheme=1"]
    ran = subprocess.run([CHROMIUM, *flags, frame.as_uri()], capture_output=True, text=True, check=True, timeout=120)
    found = json.loads(re.search(r'<pre id="found">(.*?)</pre>', ran.stdout, re.DOTALL)[1])
    assert found == {
        "overflow": 0,
        "requests": [],
        "scripts": 0,
        "ran": False,
        "background": "rgb(20, 23, 27)" if dark else "rgb(255, 255, 255)",
    }
    assert ":CONSOLE" not in ran.stderr
