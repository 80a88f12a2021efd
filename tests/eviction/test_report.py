"""The report: it holds what it says, asks nothing of anybody, and looks right in a real browser."""

from __future__ import annotations

import json
import os
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from kvcache.errors import BadInput
from kvcache.eviction.advise.charts import Axis, Series, bar_chart, line_chart
from kvcache.eviction.commands.tune import tune
from kvcache.eviction.traces.trace import write_trace
from tests.eviction.browser import picture, pixels, run
from tests.eviction.test_advice import scans

LIGHT, DARK = (255, 255, 255), (20, 24, 29)
EVIL = "a<script>b&\"'.npz"


def report(*arguments: str) -> Result:
    return CliRunner().invoke(tune, ["report", *arguments], catch_exceptions=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_trace(folder / EVIL, scans(20, 30, 20))
    arguments = ("--capacity", "60", "--model", "llama-3.1-8b", "--output", str(folder / "report.html"))
    result = report(str(folder / EVIL), *arguments, "--json")
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    assert said["report"] == str(folder / "report.html") and said["policy"] == "leaf-arc"
    return folder / "report.html"


class Seen(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag not in ("meta", "polyline", "circle", "rect", "line"):
            self.open.append(tag)
        self.addresses += [f"{name}={value}" for name, value in attrs if name in ("src", "href", "action")]

    def handle_endtag(self, tag: str) -> None:
        if tag not in ("polyline", "circle", "rect", "line"):
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def seen(path: Path) -> Seen:
    parser = Seen()
    parser.feed(path.read_text(encoding="utf-8"))
    parser.close()
    assert not parser.open
    return parser


@pytest.mark.slow
def test_it_holds_what_it_says(made: Path) -> None:
    found = seen(made)
    for text in (
        EVIL,
        "Change the policy from leaf-lru to leaf-arc.",
        "By size",
        "What was tried",
        "In time",
        "How soon prompts come back",
        "How deep prompts are",
        "leaf-hazard",
        "optimum",
        "advised",
    ):
        assert text in found.text, text
    assert found.tags.count("polyline") == 4 + 2 + 3
    assert found.tags.count("table") == 2


@pytest.mark.slow
def test_it_asks_nothing_of_anybody(made: Path) -> None:
    found = seen(made)
    assert not {"script", "link", "img", "iframe", "object", "image", "use"} & set(found.tags)
    assert not found.addresses
    text = made.read_text(encoding="utf-8")
    assert "default-src 'none'" in text
    assert not re.findall(r"https?:|url\(|@import|//[a-z]", text)


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.timeout(600)
def test_it_is_seen_in_light_and_dark(made: Path, tmp_path: Path) -> None:
    for dark, ground in ((False, LIGHT), (True, DARK)):
        for width in (1_000, 500):
            lines = pixels(picture(made.as_uri(), tmp_path, dark=dark, width=width))
            step = len(lines[0]) // width
            assert tuple(lines[2][:3]) == ground
            colours = {bytes(line[at : at + 3]) for line in lines[::3] for at in range(0, len(line), step)}
            assert len(colours) > 50
            # Nothing runs out of the page to the right, or is drawn over its margin.
            assert {bytes(line[-step:][:3]) for line in lines} == {bytes(ground)}


@contextmanager
def served(page: bytes) -> Iterator[tuple[str, list[str]]]:
    """A server that answers everything with ``page``: its address, and what it is asked for."""
    paths: list[str] = []

    class Noting(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            paths.append(self.path)
            self.send_response(200)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.end_headers()
            self.wfile.write(page)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Noting) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}", paths
        finally:
            server.shutdown()
            thread.join()


@pytest.mark.slow
@pytest.mark.browser
@pytest.mark.timeout(600)
@pytest.mark.parametrize("planted", [False, True])
def test_no_request_leaves_the_page(made: Path, tmp_path: Path, planted: bool) -> None:
    """Served to a browser, the page is all that is asked for (and the icon, by the browser itself). With a
    picture planted in it and its policy taken out, this test sees that it is asked for."""
    text = made.read_text(encoding="utf-8")
    if planted:
        text = text.replace("default-src 'none'", "default-src *").replace("<h1>", '<img src="/planted"><h1>')
    with served(text.encode()) as (address, paths):
        assert "Change the policy" in run(f"{address}/page", tmp_path, "--dump-dom")
    others = {path for path in paths if path not in ("/page", "/favicon.ico")}
    assert others == ({"/planted"} if planted else set())


@pytest.mark.slow
def test_a_page_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    write_trace(tmp_path / "scans.npz", scans(20, 30, 10))
    error = report(
        str(tmp_path / "scans.npz"), "--capacity", "60", "--output", str(tmp_path / "none" / "x.html")
    ).exception
    assert isinstance(error, BadInput) and "cannot be written" in error.what


def test_where_the_page_cannot_be_is_said_before_anything_takes_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kvcache.eviction.commands.report.opened", pytest.fail)
    for output in (tmp_path, tmp_path / "none" / "x.html"):
        error = report("any.npz", "--capacity", "60", "--output", str(output)).exception
        assert isinstance(error, BadInput) and "cannot be written" in error.what


@pytest.mark.slow
def test_a_name_that_is_no_text_gives_a_page_all_the_same(tmp_path: Path) -> None:
    name = os.fsencode(tmp_path) + b"/\xff\x1b<b>.npz"
    write_trace(Path(os.fsdecode(name)), scans(20, 30, 10))
    page = tmp_path / "x.html"
    result = report(os.fsdecode(name), "--capacity", "60", "--output", str(page))
    assert result.exit_code == 0, result.output
    text = page.read_text(encoding="utf-8")
    assert "<h1>??&lt;b&gt;.npz" in text and "<b>" not in text


def test_lines_are_where_they_belong() -> None:
    axis = Axis([(1, "one"), (10, "ten"), (100, "a & b")], "size", logarithmic=True, mark=(10, "here"))
    chart = line_chart("<t>", [Series("x<y", [(1, 0.0), (10, 0.2), (100, 0.4)], dashed=True)], axis)
    [points] = re.findall(r'points="([^"]*)"', chart)
    places = [tuple(map(float, each.split(","))) for each in points.split()]
    assert places[1][0] == pytest.approx((places[0][0] + places[2][0]) / 2)
    assert places[1][1] == pytest.approx((places[0][1] + places[2][1]) / 2)
    assert "x&lt;y" in chart and "a &amp; b" in chart and "&lt;t&gt;" in chart and "40%" in chart
    assert "x<y" not in chart and "<t>" not in chart
    assert 'class="mark"' in chart and "stroke-dasharray" in chart


def test_ticks_and_bars_stay_inside() -> None:
    axis = Axis([(0, "0"), (1, "1,000,000,000")], "requests")
    chart = line_chart("t", [Series("x", [(0, 0.01), (1, 0.001)])], axis)
    x, _ = next(re.finditer(r'<text x="([0-9.]+)"[^>]*>(1,000)', chart)).groups()
    assert float(x) + len("1,000,000,000") * 7 / 2 <= 720
    bars = bar_chart("t", [("a", 0.75), ("b", 0.25), ("c", 0.0)])
    widths = [float(each) for each in re.findall(r'width="([0-9.]+)"', bars)]
    assert widths[0] == pytest.approx(3 * widths[1], abs=0.2) and widths[2] == 0
    assert "svg" in bar_chart("t", [])
