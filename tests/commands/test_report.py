"""The page about runs: what a browser makes of it, what it says of damaged logs, and that nothing in it is run."""

import json
import math
import re
import shutil
import socketserver
import subprocess
import threading
from html.parser import HTMLParser
from pathlib import Path

import pytest

from minilm.commands import report
from minilm.commands.charts import build_panels, choose_ticks
from minilm.commands.report import write_report
from minilm.config import Config, MaskedLM, Optim
from minilm.config.serialization import to_dict
from minilm.runs.run_log import read_runs

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
EVIL = '</script><script>console.error("ran")</script><img src="http://example.test/x.png" onerror="console.error(1)">'


def step(number: int, **figures: object) -> dict[str, object]:
    line = {"step": number, "epoch": number / 10, "loss": 8 / number, "lr": 1e-3 / number, "grad_norm": 1.0}
    return {**line, "tokens": 50 * number, "tokens_per_second": 900.0, "mfu": 0.3, "memory_gb": 1.5, **figures}


def evaluation(number: int, **figures: object) -> dict[str, object]:
    return {
        "step": number,
        "epoch": number / 10,
        "eval_loss": 5 / number,
        "perplexity": math.exp(5 / number),
        **figures,
    }


def write_run(folder: Path, lines: list[object], *, lr: float = 5e-4, planned: int = 30) -> str:
    """A run's folder with these lines in its log, strings as they are."""
    folder.mkdir(parents=True)
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "log.jsonl").write_text("".join(f"{text}\n" for text in texts))
    run = {"config": to_dict(Config(optim=Optim(lr=lr))), "steps": planned, "hardware": {"device": "An abacus"}}
    (folder / "run.json").write_text(json.dumps(run))
    return str(folder)


def usual(count: int = 30) -> list[object]:
    return [line for n in range(1, count + 1) for line in ([step(n), evaluation(n)] if n % 10 == 0 else [step(n)])]


class Page(HTMLParser):
    """The texts of the cells, row by row, and all addresses that a page could ask for."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.rows: dict[str, list[str]] = {}
        self.asked: list[tuple[str, str | None]] = []
        self.tags: list[str] = []
        self._cells: list[str] = []
        self._in_cell = False
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.asked += [pair for pair in attributes if pair[0] in ("src", "href", "action", "data", "srcset")]
        self._in_cell = tag in ("td", "th")
        if tag == "tr":
            self._cells = []
        elif self._in_cell:
            self._cells.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_cell = False
        if tag == "tr":
            self.rows[self._cells[0]] = self._cells[1:]

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self._cells[-1] += data


def read_page(*folders: str, to: Path) -> tuple[str, Page]:
    write_report(folders, str(to))
    text = to.read_text(encoding="utf-8")
    return text, Page(text)


def test_a_page_has_a_chart_for_each_figure_and_a_line_for_each_run(tmp_path):
    first = write_run(tmp_path / "first", usual())
    second = write_run(tmp_path / "second", [*usual(10), {"step": 10, "sample": "A <b> & c", "output": "d"}], lr=1e-3)
    text, page = read_page(first, second, to=tmp_path / "page.html")
    titles = re.findall(r"<figcaption><b>(.*?)</b>", text)
    assert [title.split(" (")[0] for title in titles] == [
        *("Training loss", "Learning rate", "Gradient norm, before clipping", "Real tokens per second", "MFU"),
        *("Most memory so far", "Evaluation loss", "Perplexity"),
    ]
    assert text.count('<path class="bold"') == 2 * len(titles)
    assert page.rows["optim.lr"] == ["0.0005", "0.001"]  # the last table, of all settings, has it too
    assert page.rows["steps"] == ["30", "30"]
    assert page.rows["hardware, device"] == ["An abacus"] * 2
    assert page.rows["A <b> & c"] == ["–", "d"]
    assert "second: the run is not finished: it is at step 10 of 30" in text
    assert not page.asked
    differing = re.search(r"<h2>Settings that differ</h2>.*?</table>", text, re.DOTALL)
    assert differing is not None
    assert list(Page(differing[0]).rows) == ["", "optim.lr"]


def test_of_one_run_the_settings_other_than_the_defaults_are_listed(tmp_path):
    text, _ = read_page(write_run(tmp_path / "a", usual(), lr=0.25), to=tmp_path / "page.html")
    listed = re.search(r"<h2>Settings other than the defaults</h2>.*?</table>", text, re.DOTALL)
    assert listed is not None
    assert Page(listed[0]).rows == {"": ["a"], "optim.lr": ["0.25"]}


def test_a_report_names_what_is_missing_or_broken_and_shows_the_rest(tmp_path):
    lines = [step(1), '{"step": 2, "los', step(3, loss=None), step(4, loss=math.nan), "[]", step(5, grad_norm=1e999)]
    lines += [{"step": 5, "spike_loss": 9.0, "usual_loss": 1.0, "examples": [1]}]
    folder = write_run(tmp_path / "a", lines, planned=5)
    (tmp_path / "a" / "run.json").write_text("{")
    (run,) = read_runs([folder])
    assert run.curves["loss"].steps == [1, 3, 4, 5]
    assert [math.isnan(value) for value in run.curves["loss"].values] == [False, True, True, False]
    assert run.notes == [
        "log.jsonl has lines that are not records, which are left out: 2 lines: 2, 5",
        "run.json cannot be read (Expecting property name enclosed in double quotes: line 1 column 2 (char 1))",
        "loss is not a finite number at 2 steps: 3, 4",
        "grad_norm is not a finite number at step 5",
        "the loss is far above the losses before it at step 5 (see log.jsonl)",
    ]
    text, _ = read_page(folder, to=tmp_path / "page.html")
    loss = text[text.index('<svg viewBox="0 0 380') : text.index("Learning rate")]
    assert loss.count('<path class="bad"') == 2
    assert len(re.findall(r"M[\d.]+ [\d.]+h0", loss)) == 2  # the line is broken between 1 and 5


def test_a_single_step_is_a_point(tmp_path):
    text, _ = read_page(write_run(tmp_path / "a", [step(1)], planned=1), to=tmp_path / "page.html")
    assert "one step only" in text
    assert text.count("<circle") == 6


def test_a_long_curve_keeps_its_extremes_and_its_gaps(tmp_path):
    lines = [step(n, loss=50.0 if n == 7001 else None if n == 9000 else 2.0) for n in range(1, 20_001)]
    text, _ = read_page(write_run(tmp_path / "a", lines, planned=20_000), to=tmp_path / "page.html")
    (panel, *_) = build_panels(read_runs([str(tmp_path / "a")]))
    assert panel.values[1] >= 50
    loss = text[: text.index("Learning rate")]
    assert loss.count('<path class="bad"') == 1
    thin = re.search(r'class="thin" [^>]*d="([^"]*)"', loss)
    assert thin is not None
    heights = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", thin[1])]
    assert len(heights) < 1300
    assert min(heights) < 20  # the peak, near the top
    assert len(text) < 300_000


@pytest.mark.parametrize(
    ("low", "high", "log", "expected"),
    [
        (0, 2300, False, [0, 500, 1000, 1500, 2000]),
        (2.1, 7.9, False, [3, 4, 5, 6, 7]),
        (0, 0.005, False, [0, 0.001, 0.002, 0.003, 0.004, 0.005]),
        (12, 2000, True, [20, 50, 100, 200, 500, 1000, 2000]),
        (0.001, 1e6, True, [10.0**n for n in range(-3, 7)]),
    ],
)
def test_ticks_are_round(low, high, log, expected):
    assert choose_ticks(low, high, log=log) == pytest.approx(expected)


def test_runs_of_the_same_name_are_distinguished_and_one_given_twice_is_shown_once(tmp_path):
    first, second = (write_run(tmp_path / part / "out", usual(2)) for part in "ab")
    assert [run.name for run in read_runs([first, second, first + "/"])] == [first, second]


def test_what_is_wrong_with_the_command_is_one_line(run, tmp_path):
    good, empty = write_run(tmp_path / "good", usual(3)), write_run(tmp_path / "empty", [])
    (tmp_path / "mine.html").write_text("my own page")
    for words, message in (
        ([str(tmp_path / "none")], "there is no such folder"),
        ([str(tmp_path)], "there is no log.jsonl in it"),
        ([good, empty], "has no record of a step or an evaluation yet"),
        ([good, "--output", str(tmp_path / "a.png")], "give a name that ends in .html"),
        ([good, "--output", str(tmp_path / "mine.html")], "is not a report: choose another name"),
        ([good, "--output", str(tmp_path / "no" / "a.html")], "cannot be written"),
    ):
        status, output, error = run("report", *words)
        assert (status, output, len(error)) == (2, [], 1)
        assert message in error[0]
    assert (tmp_path / "mine.html").read_text() == "my own page"
    path = tmp_path / "a.html"
    for _ in range(2):  # a report may be written over
        assert run("report", good, "--output", str(path)) == (None, [f"written: {path}"], [])


def test_the_curves_as_a_picture(tmp_path):
    pytest.importorskip("matplotlib", reason="the extra `report` is not installed")
    folder = write_run(tmp_path / "a$b_", [step(1, loss=None), *usual(120), evaluation(121, eval_loss=None)])
    page, picture = write_report([folder], str(tmp_path / "a.html"), png=True)
    assert page.exists()
    assert picture.read_bytes().startswith(b"\x89PNG")


class _Proxy(socketserver.ThreadingTCPServer):
    """Takes down the first line of what a browser asks it for."""

    daemon_threads = True

    def __init__(self) -> None:
        self.asked: list[str] = []
        super().__init__(("127.0.0.1", 0), _Asked)


class _Asked(socketserver.StreamRequestHandler):
    def handle(self) -> None:
        assert isinstance(self.server, _Proxy)
        self.server.asked.append(self.rfile.readline().decode())


def browse(path: Path) -> tuple[str, str, list[str]]:
    """A page in a real browser: the document after its scripts, what the console says, and what was asked for."""
    assert CHROMIUM is not None
    with _Proxy() as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
        command += ["--disable-background-networking", "--disable-component-update", "--no-first-run"]
        command += ["--disable-sync", "--disable-default-apps", "--disable-extensions", "--no-pings"]
        command += [f"--user-data-dir={path.parent / 'profile'}", "--window-size=400,800"]
        command += [f"--proxy-server=http://127.0.0.1:{proxy.server_address[1]}", "--proxy-bypass-list=<-loopback>"]
        command += ["--enable-logging=stderr", "--virtual-time-budget=1000", "--dump-dom", path.as_uri()]
        done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
        proxy.shutdown()
        console = "\n".join(line for line in done.stderr.splitlines() if "CONSOLE" in line)
        asked = [line for line in proxy.asked if "google" not in line]  # the browser's own, if its flags let one pass
        return done.stdout, console, asked


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")
def test_a_browser_shows_the_curves_and_asks_no_network(tmp_path):
    first = write_run(tmp_path / "first", [*usual(120), {"step": 120, "sample": EVIL, "output": EVIL}])
    second = write_run(tmp_path / "second" / "<img src='http:evil.test'>", usual(60))
    text, _ = read_page(first, second, to=tmp_path / "page.html")
    # As a reader would do: point at the middle of the first chart, where step 60 is.
    move = """<script>
      const box = document.querySelector("figure svg").getBoundingClientRect();
      const middle = box.left + box.width * (50 + 360) / 2 / 380;
      document.querySelector("figure svg").dispatchEvent(new PointerEvent("pointermove", {clientX: middle}));
      document.body.dataset.wide = document.documentElement.scrollWidth > innerWidth;
    </script>"""
    (tmp_path / "page.html").write_text(text.replace("</body>", move + "</body>"))
    document, console, asked = browse(tmp_path / "page.html")
    assert console == ""
    assert asked == []
    assert 'data-wide="false"' in document  # nothing sticks out of a narrow screen
    assert len(re.findall(r'<path class="bold"[^>]* d="M[^"]*L', document)) == 16
    outputs = re.findall(r"<output>(.*?)</output>", document)
    assert len(outputs) == 8
    read = [re.sub("<.*?>", "", output) for output in outputs]
    assert all(output.startswith("step 60: ") for output in read)
    assert read[7] == "step 60: ● 1.0869 ● 1.0869 "  # perplexity, exp(5 / 60)


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")
def test_the_browser_test_would_hear_of_a_request_and_of_an_error(tmp_path):
    (tmp_path / "page.html").write_text('<img src="http://example.test/x.png"><script>throw Error("no")</script>')
    _, console, asked = browse(tmp_path / "page.html")
    assert "Error: no" in console
    assert len(asked) == 1
    assert "example.test/x.png" in asked[0]


def test_the_page_forbids_itself_to_load_anything(tmp_path):
    text, _ = read_page(write_run(tmp_path / "a", usual(3)), to=tmp_path / "page.html")
    assert "default-src 'none'" in text
    assert not re.search(r"https?://|@import|url\(", text)
    assert MaskedLM.__name__ in text
    assert report._MARK in text
