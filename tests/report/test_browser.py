"""The pages in a real browser, where there is one: no errors, nothing fetched, nothing wider than a phone."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path

import pytest
from run_directories import RESULTS, make_run

from llmkit.report.comparison import compare
from llmkit.report.comparison_page import comparison_html
from llmkit.report.page import report_html, write_page
from llmkit.report.record import read_record

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine: apt-get install chromium")

# A page's own policy keeps scripts out, so that the probe is a second page, which has it in a frame of a phone's width.
PROBE = """<!DOCTYPE html><iframe id="page" src="{page}" style="width: 360px; height: 700px; border: 0"></iframe>
<script>
onload = () => {{
  const inside = document.getElementById("page").contentDocument;
  const root = inside.documentElement;
  const drawings = [...inside.querySelectorAll("svg")].map(svg => svg.getBoundingClientRect());
  const colour = name => getComputedStyle(root).getPropertyValue(name).trim();
  const found = {{
    wider: root.scrollWidth - root.clientWidth,
    drawings: drawings.length,
    flat: drawings.filter(box => box.width < 100 || box.height < 40).length,
    unpainted: [...inside.querySelectorAll("svg text")].filter(text => getComputedStyle(text).fill === "none").length,
    fetched: inside.defaultView.performance.getEntriesByType("resource").map(entry => entry.name),
    scripts: inside.scripts.length,
    ink: colour("--ink"),
  }};
  document.title = "probed";
  document.body.append(Object.assign(document.createElement("pre"), {{id: "found", textContent: JSON.stringify(found)}}));
}};
</script>"""


def browse(page: Path, tmp_path: Path, *arguments: str) -> tuple[dict[str, object], str]:
    """What the probe found, and what the browser wrote to its console."""
    assert BROWSER is not None
    probe = tmp_path / "probe.html"
    probe.write_text(PROBE.format(page=page.name))
    command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    command += ["--allow-file-access-from-files", "--enable-logging=stderr", "--virtual-time-budget=5000", *arguments]
    done = subprocess.run(
        [*command, "--dump-dom", probe.as_uri()], capture_output=True, text=True, timeout=120, check=False
    )
    _, _, rest = done.stdout.partition('<pre id="found">')
    assert rest, done.stderr[-2000:]
    console = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
    return json.loads(
        rest.partition("</pre>")[0].replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">")
    ), console


@pytest.fixture
def pages(tmp_path: Path) -> list[Path]:
    """A report, and a comparison, beside each other."""
    runs = [make_run(tmp_path / name, results=RESULTS) for name in ("one", "two")]
    write_page(tmp_path / "report.html", report_html(read_record(runs[0])))
    write_page(tmp_path / "comparison.html", comparison_html(compare(runs)))
    return [tmp_path / "report.html", tmp_path / "comparison.html"]


def test_pages_in_a_browser(pages: list[Path], tmp_path: Path) -> None:
    for page, drawings in zip(pages, (12, 6), strict=True):
        found, console = browse(page, tmp_path)
        assert console == ""
        assert found == {
            "wider": 0,
            "drawings": drawings,
            "flat": 0,
            "unpainted": 0,
            "fetched": [],
            "scripts": 0,
            "ink": "#16191f",
        }


def test_dark(pages: list[Path], tmp_path: Path) -> None:
    found, console = browse(pages[0], tmp_path, "--blink-settings=preferredColorScheme=0")
    assert console == ""
    assert found["ink"] == "#e8ebf0"
