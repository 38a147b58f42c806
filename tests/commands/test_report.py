"""The page about runs: what a browser makes of it, what it says of damaged logs, and that nothing in it is run."""

import html
import json
import math
import re
import shutil
import socketserver
import subprocess
import threading
from collections.abc import Sequence
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from minilm.commands import report
from minilm.commands.report import write_live_report, write_report
from minilm.commands.report_sections import compare_runs, format_figure, group_seeds
from minilm.config import Config, MaskedLM, Optim, Run
from minilm.config.serialization import to_dict
from minilm.runs.run_history import HISTORY
from minilm.runs.run_log import find_run_folders, read_runs
from minilm.utils.folder_lock import lock_folder, unlock_folder

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
EVIL = '</script><script>console.error("ran")</script><img src="http://example.test/x.png" onerror="console.error(1)">'


def step(number: int, **figures: object) -> dict[str, object]:
    line = {"step": number, "epoch": number / 10, "loss": 8 / number, "lr": 1e-3 / number, "grad_norm": 1.0}
    speed = {"tokens": 50 * number, "tokens_per_second": 900.0, "mfu": 0.3, "seconds": 0.5 * number}
    return {**line, **speed, "memory_gb": 1.5, **figures}


def evaluation(number: int, **figures: object) -> dict[str, object]:
    return {
        "step": number,
        "epoch": number / 10,
        "eval_loss": 5 / number,
        "perplexity": math.exp(5 / number),
        **figures,
    }


def write_run(
    folder: Path,
    lines: list[object],
    *,
    lr: float = 5e-4,
    planned: int = 30,
    seed: int = 0,
    history: Sequence[object] = (),
) -> str:
    """A run's folder with these lines in its log, strings as they are, and these events in its history."""
    folder.mkdir(parents=True)
    texts = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    (folder / "log.jsonl").write_text("".join(f"{text}\n" for text in texts))
    config = Config(optim=Optim(lr=lr), run=Run(seed=seed))
    run = {"config": to_dict(config), "steps": planned, "hardware": {"device": "An abacus"}}
    (folder / "run.json").write_text(json.dumps(run))
    if history:
        (folder / HISTORY).write_text("".join(json.dumps(event) + "\n" for event in history))
    return str(folder)


def usual(count: int = 30) -> list[object]:
    return [line for n in range(1, count + 1) for line in ([step(n), evaluation(n)] if n % 10 == 0 else [step(n)])]


def start(number: int = 0, **facts: object) -> dict[str, object]:
    return {"event": "start", "time": "2026-11-29T12:00:00+00:00", "step": number, "command": "python a.py", **facts}


def end(status: str, reason: str = "") -> dict[str, object]:
    return {"event": "end", "time": "2026-11-29T12:02:05+00:00", "status": status, "reason": reason}


def write_ledger(folder: str, losses: dict[int, list[float]], **identity: str) -> None:
    """Write a ledger with these losses of examples by step, two targets in each example."""
    known = {"objective": "CausalLM", "loss": "{}", "examples": "x", "documents": "y", "overflow": "split", **identity}
    place = Path(folder, "ledger")
    place.mkdir()
    count = len(next(iter(losses.values())))
    facts = {"targets": np.full(count, 2, np.int32), "utf8_bytes": np.full(count, 8, np.int32)}
    save_file(facts, place / "examples.safetensors", {"identity": json.dumps(known)})
    for number, values in losses.items():
        save_file({"loss": np.array(values, np.float32)}, place / f"eval-{number}.safetensors")


def read_data(text: str) -> dict[str, Any]:
    """Return the JSON that the script of a page draws."""
    (found,) = re.findall(r'<script id="data" type="application/json">(.*?)</script>', text, re.DOTALL)
    data: dict[str, Any] = json.loads(found)
    return data


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
        if tag == "tr":
            self._cells = []
        elif tag in ("td", "th"):
            self._in_cell = True
            self._cells.append("")

    def handle_endtag(self, tag: str) -> None:
        self._in_cell &= tag not in ("td", "th")
        if tag == "tr":
            self.rows[self._cells[0].strip()] = self._cells[1:]

    def handle_data(self, data: str) -> None:
        if self._in_cell:
            self._cells[-1] += data


def read_page(*folders: str, to: Path) -> tuple[str, Page]:
    write_report(folders, str(to))
    text = to.read_text(encoding="utf-8")
    return text, Page(text)


def test_a_page_has_a_chart_for_each_figure_and_a_curve_for_each_run(tmp_path):
    first = write_run(tmp_path / "first", usual())
    second = write_run(tmp_path / "second", [*usual(10), {"step": 10, "sample": "A <b> & c", "output": "d"}], lr=1e-3)
    text, page = read_page(first, second, to=tmp_path / "page.html")
    titles = re.findall(r'<b class="title">(.*?)</b>', text)
    assert [title.split(" (")[0] for title in titles] == [
        *("Loss", "Learning rate", "Gradient norm, before clipping", "Real tokens per second", "MFU"),
        *("Most memory so far", "Perplexity"),
    ]
    panels = read_data(text)["panels"]
    assert [[(curve["run"], curve["part"]) for curve in panel["curves"]] for panel in panels] == [
        [(0, "training"), (1, "training"), (0, "evaluation"), (1, "evaluation")],
        *[[(0, "training"), (1, "training")]] * 5,
        [(0, "evaluation"), (1, "evaluation")],
    ]
    assert panels[0]["curves"][1]["values"] == [float(f"{8 / n:.5g}") for n in range(1, 11)]
    assert panels[0]["curves"][2]["best"] == {"step": 30, "value": 0.16667}
    assert page.rows["optim.lr"] == ["0.0005", "0.001"]  # the last table, of all settings, has it too
    assert page.rows["Steps"] == ["30", "10"]
    assert page.rows["Most memory"] == ["1.5 GB", "1.5 GB"]
    assert page.rows["hardware, device"] == ["An abacus"] * 2
    assert page.rows["A <b> & c"] == ["–", "d"]
    assert not page.asked
    differing = re.search(r"<h2>Settings that differ</h2>.*?</table>", text, re.DOTALL)
    assert differing is not None
    assert list(Page(differing[0]).rows) == ["", "optim.lr"]


def test_the_top_of_a_page_about_one_run_says_how_it_stands(tmp_path):
    history = [start(command="python a.py --x '<b>'"), end("failed", "OutOfMemoryError: 3 < 4")]
    text, _ = read_page(write_run(tmp_path / "a", usual(), planned=99, history=history), to=tmp_path / "page.html")
    top = html.unescape(re.sub(r"<[^<>]*>", "|", text[text.index("<h1>") : text.index("<h2>")]))
    for part in (
        *("failed at step 30 of 99: OutOfMemoryError: 3 < 4", "python a.py --x '<b>'", "An abacus", "2026-11-29"),
        *("Best evaluation loss||0.16667|at step 30", "Duration||2 min 5 s", "Steps||30|of 99, 2.0 steps/s"),
        *("Speed||100 tokens/s", "Most memory||1.5 GB"),
    ):
        assert part in top, top
    assert text.index("<h2>Results") < text.index("<h2>Curves")


def test_a_page_about_several_runs_begins_with_a_row_for_each(tmp_path):
    write_run(tmp_path / "out" / "a", usual(), history=[start(), end("stopped", "SIGINT after step 30")])
    write_run(tmp_path / "out" / "deep" / "er" / "b", usual(10))
    write_run(tmp_path / "out" / "too" / "deep" / "for" / "c", usual(10))
    write_run(tmp_path / "out" / "begins", [])
    (tmp_path / "out" / "begins" / "run.json").unlink()  # a run that has just taken its folder
    write_run(tmp_path / "out" / "failed", [], history=[start(), end("failed", "OutOfMemoryError: no")])
    assert len(find_run_folders(tmp_path / "out")) == 3
    _, page = read_page(str(tmp_path / "out"), to=tmp_path / "page.html")
    assert page.rows["Run"][:3] == ["Status", "Best evaluation", "Steps"]
    assert page.rows["a"] == [
        *("stopped at step 30 of 30: SIGINT after step 30", "0.16667 evaluation loss, step 30", "30"),
        *("2 min 5 s", "100 tokens/s", page.rows["a"][-1]),
    ]
    assert page.rows["b"][0] == "unknown not finished, at step 10 of 30"
    assert page.rows["failed"][:3] == ["failed at step 0 of 30: OutOfMemoryError: no", "–", "0"]


def test_of_one_run_without_a_recipe_the_settings_other_than_the_defaults_are_listed(tmp_path):
    text, _ = read_page(write_run(tmp_path / "a", usual(), lr=0.25), to=tmp_path / "page.html")
    listed = re.search(r"<h2>Settings other than the defaults</h2>.*?</table>", text, re.DOTALL)
    assert listed is not None
    assert Page(listed[0]).rows == {"": ["a"], "optim.lr": ["0.25"]}


def test_runs_of_a_recipe_show_what_they_changed_and_where_they_differ(tmp_path):
    changed = {"optim.lr": [0.1, 0.25], "run.output_dir": [None, "x"]}
    first = write_run(tmp_path / "a", usual(), lr=0.25, history=[start(changed=changed)])
    second = write_run(tmp_path / "b", usual(), lr=0.1, seed=3, history=[start(changed={"run.seed": [0, 3]})])
    text, _ = read_page(first, second, to=tmp_path / "page.html")
    listed = re.search(r"<h2>Settings that are not the recipe&#x27;s</h2>.*?</table>", text, re.DOTALL)
    assert listed is not None
    rows = {"": ["recipe", "a", "b"], "optim.lr": ["0.1", "0.25", "0.1"], "run.seed": ["0", "0", "3"]}
    assert Page(listed[0]).rows == rows
    assert re.findall("<b>(.*?)</b>", listed[0]) == ["0.25", "3"]


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
    (loss, *_) = read_data(text)["panels"][0]["curves"]
    assert (loss["values"], loss["bad"]) == ([8.0, None, None, 1.6], [3, 4])


def test_a_single_step_is_a_point(tmp_path):
    text, _ = read_page(write_run(tmp_path / "a", [step(1)], planned=1), to=tmp_path / "page.html")
    assert "one step only" in text
    assert [len(curve["steps"]) for panel in read_data(text)["panels"] for curve in panel["curves"]] == [1] * 6


def test_a_run_that_failed_before_its_first_step_has_a_page(tmp_path):
    folder = write_run(tmp_path / "a", [], history=[start(), end("failed", "RuntimeError: no memory")])
    text, _ = read_page(folder, to=tmp_path / "page.html")
    assert "failed at step 0 of 30: RuntimeError: no memory" in text
    assert "There is no record of a step yet" in text


def test_a_long_curve_keeps_its_extremes_its_mean_and_its_gaps(tmp_path):
    lines = [step(n, loss=50.0 if n == 7001 else None if n == 9000 else 2.0) for n in range(1, 20_001)]
    text, _ = read_page(write_run(tmp_path / "a", lines, planned=20_000), to=tmp_path / "page.html")
    data = read_data(text)
    (loss,) = data["panels"][0]["curves"]
    assert len(loss["steps"]) <= 600
    assert (max(loss["high"]), min(loss["low"]), loss["bad"]) == (50.0, 2.0, [9000])
    assert max(loss["values"]) == pytest.approx(2 + 48 / 34, rel=1e-4)  # a point is the mean of 34 steps
    assert loss["steps"][-1] == 20_000
    axis = data["runs"][0]["axis"]
    assert [axis[name][-1] for name in ("step", "tokens", "seconds")] == [20_000, 1_000_000, 10_000.0]
    assert len(text) < 300_000


def test_a_chart_says_in_words_what_it_shows(tmp_path):
    text, _ = read_page(write_run(tmp_path / "a", usual()), to=tmp_path / "page.html")
    labels = [html.unescape(label) for label in re.findall(r'<svg role="img" aria-label="(.*?)">', text)]
    assert labels[0] == (
        "Loss (nats per target). a, training: 8 to 0.2667; a, evaluation: 0.5 to 0.1667, best 0.1667 at step 30."
    )
    assert all(re.search(r"a: [\d.e+-]+ to [\d.e+-]+", label) for label in labels[1:])


def test_runs_of_the_same_name_are_distinguished_and_one_given_twice_is_shown_once(tmp_path):
    first, second = (write_run(tmp_path / part / "out", usual(2)) for part in "ab")
    assert [run.name for run in read_runs([first, second, first + "/"])] == ["a/out", "b/out"]


def test_runs_that_differ_in_their_seed_alone_are_a_group(tmp_path):
    places = [write_run(tmp_path / "a" / f"seed-{seed}", usual(2), seed=seed) for seed in (0, 1)]
    places.append(write_run(tmp_path / "b", usual(2), lr=0.5))
    places.append(write_run(tmp_path / "copy", usual(2), lr=0.5))  # the same seed again
    places.append(write_run(tmp_path / "c", usual(2), seed=2))
    assert group_seeds(read_runs(places[:4])) == [("a (2 seeds)", [0, 1])]
    assert group_seeds(read_runs(places)) == [("a/seed-0 (3 seeds)", [0, 1, 4])]
    assert group_seeds(read_runs(places[2:4])) == []


def test_seeds_have_their_mean_and_standard_deviation(tmp_path):
    for seed, loss in ((0, 2.0), (1, 3.0), (2, 7.0)):
        write_run(tmp_path / "out" / f"seed-{seed}", [step(1), evaluation(1, eval_loss=loss)], seed=seed)
    text, _ = read_page(str(tmp_path / "out"), to=tmp_path / "page.html")
    means = re.search(r"<h2>Means over seeds.*?</table>", text, re.DOTALL)
    assert means is not None
    assert Page(means[0]).rows["Evaluation loss"] == ["4 ± 2.6"]


def test_the_differences_are_those_of_minilm_compare_and_a_refusal_is_shown(tmp_path):
    losses = [2.0 + n % 5 for n in range(60)]
    places = []
    for name, factor, examples in (("a", 1.0, "x"), ("b", 0.9, "x"), ("c", 1.0, "z")):
        places.append(write_run(tmp_path / name, usual(), lr=factor))
        identity = {"examples": examples, "documents": examples}
        write_ledger(
            places[-1],
            {10: losses, 30: [factor * loss * (1 + n % 3 / 100) for n, loss in enumerate(losses)]},
            **identity,
        )
    runs = read_runs(places)
    rows = compare_runs(runs, [])
    assert [row[:2] for row in rows] == [["b − a", "Bits per byte"], ["b − a", "Evaluation loss"], ["c − a", "–"]]
    assert re.fullmatch(r"−0\.2\d+ ± 0\.0\d+: better", rows[1][2])
    assert rows[1][3:] == ["< 0.001", "60 examples"]
    assert "the evaluation documents of the models" in rows[2][2]
    runs[1].running = True  # its last evaluation would change
    assert [row[0] for row in compare_runs(runs, [])] == ["c − a"]


def test_seeds_are_compared_in_pairs(tmp_path):
    places = []
    for lr, factor in ((0.1, 1.0), (0.2, 0.9)):
        for seed in (1, 2, 3):
            places.append(write_run(tmp_path / f"lr-{lr}" / f"seed-{seed}", usual(), lr=lr, seed=seed))
            write_ledger(places[-1], {30: [factor * (2.0 + seed / 10 + n % 5) + seed * lr / 100 for n in range(20)]})
    runs = read_runs(places)
    groups = group_seeds(runs)
    assert [name for name, _ in groups] == ["lr-0.1 (3 seeds)", "lr-0.2 (3 seeds)"]
    paired = [row for row in compare_runs(runs, groups) if row[4] == "3 seeds"]
    assert [row[0] for row in paired] == ["lr-0.2 (3 seeds) − lr-0.1 (3 seeds)"] * 2
    assert all(row[2].endswith("better") for row in paired)


def test_the_ledger_section_has_the_spread_of_the_losses_and_the_hardest_examples(tmp_path):
    folder = write_run(tmp_path / "a", usual())
    write_ledger(folder, {10: [2.0, 4.0, 6.0, 8.0], 30: [1.0, 2.0, 10.0, 4.0]})
    text, page = read_page(folder, to=tmp_path / "page.html")
    assert page.rows["step 10"] == ["1.300", "2.500", "3.700", "–"]  # quantiles of 1, 2, 3, 4
    assert page.rows["step 30"][1:] == ["1.500", "4.100", "75%"]
    assert page.rows["example 2"] == ["3.000", "5.000", "2"]
    assert f"minilm ledger {folder}" in text
    Path(folder, "ledger", "eval-30.safetensors").write_bytes(b"broken")
    text, _ = read_page(folder, to=tmp_path / "page.html")
    assert "The ledger" not in text


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        *(("mfu", 0.357, "36%"), ("memory_gb", 1.234, "1.2 GB"), ("train_seconds", 125.2, "2 min 5 s")),
        *(("tokens_per_second", 18012.3, "18,012 tokens/s"), ("tokens", 622507, "622,507"), ("accuracy", 0.853, "85%")),
        *(("eval_loss", 5.900628, "5.9006"), ("padding_share", 0.0, "0%"), ("energy_kwh", 0.0123, "0.012 kWh")),
        *(("mfu", None, "–"), ("mfu", math.nan, "nan")),
    ],
)
def test_a_figure_is_written_as_people_write_it(name, value, expected):
    assert format_figure(name, value) == expected


def test_a_live_page_is_written_until_no_run_goes_on(tmp_path, monkeypatch):
    monkeypatch.setattr(report, "LIVE_SECONDS", 0.01)
    folder, page = Path(write_run(tmp_path / "a", [], history=[start()])), tmp_path / "page.html"
    lock_folder(folder)
    versions = write_live_report([str(folder)], str(page))
    assert [run.status.kind for run in next(versions)[1]] == ["running"]
    assert read_data(page.read_text())["live"] > 0
    assert 'name="live"' in page.read_text()
    with (folder / "log.jsonl").open("a") as file:
        file.write(json.dumps(step(1)) + "\n")
    next(versions)
    assert read_data(page.read_text())["panels"][0]["curves"][0]["values"] == [8.0]
    unlock_folder(folder)
    (last,) = versions
    assert last[1][0].status.kind == "killed"
    assert read_data(page.read_text())["live"] == 0
    assert 'name="live"' not in page.read_text()


def test_what_is_wrong_with_the_command_is_one_line(run, tmp_path):
    good, empty = write_run(tmp_path / "good", usual(3)), write_run(tmp_path / "empty", [])
    (tmp_path / "empty" / "run.json").unlink()
    (tmp_path / "mine.html").write_text("my own page")
    (tmp_path / "bare").mkdir()
    for words, message in (
        ([str(tmp_path / "none")], "there is no such folder"),
        ([str(tmp_path / "bare")], "there is no log.jsonl in it"),
        ([good, empty], "has no record of a step or an evaluation yet"),
        ([good, "--output", str(tmp_path / "a.png")], "give a name that ends in .html"),
        ([good, "--output", str(tmp_path / "mine.html")], "is not a report: choose another name"),
        ([good, "--output", str(tmp_path / "no" / "a.html")], "cannot be written"),
        ([good, "--live", "--output", str(tmp_path / "no" / "a.html")], "cannot be written"),
        ([good, "--live", "--png"], "--live and --png exclude each other"),
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


needs_chromium = pytest.mark.skipif(CHROMIUM is None, reason="no chromium here: apt-get install chromium")


def interact(path: Path, script: str) -> Any:
    """Return what a script returns that runs in the page, after its own one. The console must stay empty."""
    text = path.read_text(encoding="utf-8")
    copy = path.with_name("interactive.html")
    run = f"(async () => {{ document.body.dataset.result = JSON.stringify(await (async () => {{ {script} }})()); }})();"
    copy.write_text(text.replace("</body>", f"<script>{HELPERS}{run}</script></body>"), encoding="utf-8")
    document, console, asked = browse(copy)
    assert (console, asked) == ("", [])
    (result,) = re.findall(r'data-result="(.*?)"', document)
    return json.loads(html.unescape(result))


# What a reader sees and does.
HELPERS = """
const byId = id => document.getElementById(id);
const figure = number => document.querySelectorAll("figure")[number];
const all = (selector, number = 0) => [...figure(number).querySelectorAll(selector)];
const paths = (number = 0) => all("path.bold", number).map(each => each.getAttribute("d"));
const said = number => figure(number).querySelector("output").textContent.trim();
const ticks = number => all("text", number).map(each => each.textContent);
function change(id, value) {
  const input = byId(id);
  if (input.type === "checkbox") input.checked = value; else input.value = value;
  input.dispatchEvent(new Event("input", { bubbles: true }));
}
"""


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The page of two seeds of a run and of another run, which was resumed after step 60."""
    place = tmp_path_factory.mktemp("three")
    noisy = [
        step(n, loss=8 / n + n % 2) if n % 10 else line for n in range(1, 121) for line in (step(n), evaluation(n))
    ]
    lines = [line for at, line in enumerate(noisy) if at == 0 or line != noisy[at - 1]]
    write_run(place / "x" / "seed-0", lines, seed=0)
    write_run(
        place / "x" / "seed-1",
        [{**line, "loss": line["loss"] + 1} if "loss" in line else line for line in lines],
        seed=1,
    )
    write_run(place / "other", usual(120), lr=0.5, history=[start(), start(60)])
    write_report([str(place)], str(place / "page.html"))
    return place / "page.html"


@needs_chromium
def test_a_browser_shows_the_curves_and_asks_no_network(tmp_path):
    events = [start(command=EVIL, changed={EVIL: [EVIL, EVIL]}), end("failed", EVIL)]
    first = write_run(tmp_path / "first", [*usual(120), {"step": 120, "sample": EVIL, "output": EVIL}], history=events)
    second = write_run(tmp_path / "second" / "<img src='http:evil.test'>", usual(60), history=events)
    read_page(first, second, to=tmp_path / "page.html")
    # As a reader would do: point at the middle of the first chart, where step 60 is.
    seen = interact(
        tmp_path / "page.html",
        """
        const svg = figure(0).querySelector("svg"), box = svg.getBoundingClientRect();
        const middle = box.left + 54 + (box.width - 54 - 14) / 2;
        svg.dispatchEvent(new PointerEvent("pointermove", { clientX: middle }));
        return { wide: document.documentElement.scrollWidth > innerWidth, outputs: [0, 6].map(said),
                 curves: document.querySelectorAll("path.bold[d*=L]").length };
        """,
    )
    assert seen["wide"] is False  # nothing sticks out of a narrow screen
    assert seen["curves"] == 16
    first_output, perplexity = seen["outputs"]
    assert first_output.startswith("step 60: ● 0.1")
    assert perplexity == "step 60: ● 1.087 ● 1.087"  # exp(5 / 60)


@needs_chromium
def test_the_browser_test_would_hear_of_a_request_and_of_an_error(tmp_path):
    (tmp_path / "page.html").write_text('<img src="http://example.test/x.png"><script>throw Error("no")</script>')
    _, console, asked = browse(tmp_path / "page.html")
    assert "Error: no" in console
    assert len(asked) == 1
    assert "example.test/x.png" in asked[0]


@needs_chromium
def test_a_run_is_hidden_and_highlighted(three):
    seen = interact(
        three,
        """
        change("seeds", false);
        const before = paths().length;
        change("show-1", false);
        const hidden = paths().length, range = ticks(0).join();
        change("show-1", true);
        byId("run-2").click();
        const faded = all("g[data-runs].faded").map(each => each.dataset.runs), pressed = byId("run-2").ariaPressed;
        byId("run-2").click();
        return { before, hidden, faded: [...new Set(faded)], pressed, after: all("g.faded").length };
        """,
    )
    assert seen == {"before": 6, "hidden": 4, "faded": ["0", "1"], "pressed": "true", "after": 0}


@needs_chromium
def test_seeds_are_a_mean_with_a_band_of_their_range(three):
    seen = interact(
        three,
        """
        change("smoothing", 0);
        const bands = all("path.band").length, curve = charts[0].curves.find(each => each.runs && each.low);
        const joined = [curve.low[4], curve.values[4], curve.high[4], curve.name];
        const colours = ["run-1", "run-2"].map(id => byId(id).querySelector("svg").style.getPropertyValue("--own"));
        change("seeds", false);
        return { bands, joined, colours, apart: all("path.band").length };
        """,
    )
    low, mean, high, name = seen["joined"]
    assert (high - low, mean, name) == (pytest.approx(1), pytest.approx((low + high) / 2), "x (2 seeds)")
    assert (seen["bands"], seen["apart"]) == (2, 0)  # one of training and one of evaluation
    assert seen["colours"] == ["var(--run1)"] * 2  # both seeds have the colour of their mean


@needs_chromium
def test_the_scales_and_the_smoothing_follow_their_controls(three):
    seen = interact(
        three,
        """
        change("seeds", false);
        change("smoothing", 0);
        const raw = charts[0].curves[1].values.slice(0, 3);
        const axes = {};
        for (const x of ["step", "tokens", "seconds"]) { change("x", x); axes[x] = [said(0), ticks(1).slice(-2)]; }
        change("x", "step");
        change("y", "linear");
        const linear = paths()[0];
        change("y", "log");
        const log = [paths()[0] !== linear, ticks(0)];
        change("y", "auto");
        change("smoothing", 0.5);
        return { raw, smooth: charts[0].curves[1].values.slice(0, 3), axes, log,
                 number: byId("smoothing").nextElementSibling.value };
        """,
    )
    a, b, c = seen["raw"]
    assert seen["smooth"] == pytest.approx([a, (a + 2 * b) / 3, (a + 2 * b + 4 * c) / 7])
    assert seen["number"] == "0.50"
    assert seen["log"][0] is True
    assert {"1", "10"} & set(seen["log"][1])
    assert [labels[-1] for _, labels in seen["axes"].values()] == ["100", "6,000", "60"]


@needs_chromium
def test_the_values_at_a_position_are_read_with_a_slider(three):
    seen = interact(
        three,
        """
        change("seeds", false); change("smoothing", 0);
        const last = said(6);
        change("position", 500);
        const middle = said(6), cursor = all("path.cursor")[0].getAttribute("visibility");
        change("position", 1000);
        return { last, middle, cursor, again: said(6) };
        """,
    )
    assert seen["middle"].startswith("step 60: ")
    assert seen["middle"].endswith("1.087")
    assert seen["cursor"] == "visible"
    assert seen["last"] == seen["again"]
    assert seen["last"].startswith("last: ")


@needs_chromium
def test_the_best_value_and_a_resume_are_marked(three):
    seen = interact(
        three,
        """
        change("seeds", false);
        const width = figure(0).querySelector("svg").viewBox.baseVal.width - 54 - 14;
        const share = x => (x - 54) / width;
        return { best: all("circle.best").map(each => share(each.cx.baseVal.value)),
                 words: all("circle.best title").map(each => each.textContent),
                 resumed: all("path.resumed").map(each => share(Number(each.getAttribute("d").match(/M([\\d.]+)/)[1]))),
                 flag: all("g > title").map(each => each.textContent) };
        """,
    )
    assert seen["best"] == pytest.approx([1.0] * 3, abs=0.01)  # at the last step
    assert seen["words"] == ["best: 0.04167"] * 3
    assert seen["resumed"] == pytest.approx([0.5], abs=0.01)
    assert "other resumed after step 60" in seen["flag"]


@needs_chromium
def test_a_chart_is_saved_as_csv_and_read_as_a_table(three):
    seen = interact(
        three,
        """
        let saved, name;
        const blobs = [];
        URL.createObjectURL = blob => { blobs.push(blob); return "blob:x"; };
        HTMLAnchorElement.prototype.click = function () { name = this.download; };
        byId("csv-0").click();
        byId("data-0").open = true;
        await new Promise(done => setTimeout(done, 50));
        return { name, text: await blobs[0].text(), rows: figure(0).querySelectorAll("tr").length,
                 head: figure(0).querySelector("tr").textContent };
        """,
    )
    assert seen["name"] == "loss.csv"
    head, first, *rest = seen["text"].splitlines()
    assert head == '"run","part","step","tokens","seconds","value","low","high"'
    assert first == '"other","training",1,50,0.5,8,8,8'
    assert len(rest) == 3 * 120 + 3 * 12 - 1
    assert (seen["rows"], seen["head"]) == (len(rest) + 2, "runpartsteptokenssecondsvalue")


@needs_chromium
def test_the_settings_stay_after_a_reload(three):
    kept = interact(
        three,
        """
        change("x", "tokens"); change("y", "log"); change("smoothing", 0.3); change("position", 400);
        change("seeds", false); change("show-1", false); byId("run-2").click();
        return location.hash;
        """,
    )
    for part in (
        "x=tokens",
        "y=log",
        "smoothing=0.3",
        "position=400",
        "seeds=0",
        "hide=x%2Fseed-0",
        "highlight=x%2Fseed-1",
    ):
        assert part in kept
    seen = interact(
        three,
        f"""
        location.hash = {json.dumps(kept)};
        restore(); draw();
        return {{ values: ["x", "y", "smoothing", "position"].map(id => byId(id).value), shown: byId("show-1").checked,
                 seeds: byId("seeds").checked, pressed: byId("run-2").ariaPressed }};
        """,
    )
    assert seen == {"values": ["tokens", "log", "0.3", "400"], "shown": False, "seeds": False, "pressed": "true"}


@needs_chromium
def test_a_live_page_reloads_itself_with_its_settings_unless_told_not_to(tmp_path):
    folder = Path(write_run(tmp_path / "a", usual(), history=[start()]))
    lock_folder(folder)
    try:
        next(write_live_report([str(folder)], str(tmp_path / "page.html")))
    finally:
        unlock_folder(folder)
    page = (tmp_path / "page.html").read_text().replace('"live":5.0', '"live":0.1')
    assert '"live":0.1' in page
    # The name of the window outlives a reload, so that the page can count its own.
    count = """
      window.name = Number(window.name || 0) + 1;
      if (window.name === "1") { control.x.value = "tokens"; form.dispatchEvent(new Event("input")); }
      if (window.name === "3") control.live.checked = false;
      document.body.dataset.loads = window.name; document.body.dataset.x = control.x.value;
    """
    (tmp_path / "page.html").write_text(page.replace("</body>", f"<script>{count}</script></body>"))
    document, console, _ = browse(tmp_path / "page.html")
    assert console == ""
    assert 'data-loads="3"' in document
    assert 'data-x="tokens"' in document


@needs_chromium
def test_every_control_has_a_label_and_takes_the_focus(three):
    seen = interact(
        three,
        """
        const controls = [...document.querySelectorAll("input:not([type=hidden]), select, button, summary")];
        const unnamed = controls.filter(each => !(each.ariaLabel || each.labels?.[0]?.textContent.trim()
                                                  || each.textContent.trim())).map(each => each.outerHTML);
        const stuck = controls.filter(each => { each.focus(); return document.activeElement !== each; });
        byId("x").focus();
        const pictures = [...document.querySelectorAll("figure svg")];
        const images = pictures.every(each => each.role === "img" && each.ariaLabel);
        return { count: controls.length, unnamed, stuck: stuck.map(each => each.outerHTML), images };
        """,
    )
    assert seen["count"] > 20
    assert (seen["unnamed"], seen["stuck"], seen["images"]) == ([], [], True)


@needs_chromium
def test_ticks_are_round(three):
    ranges = {
        (0, 2300, False): [0, 500, 1000, 1500, 2000],
        (2.1, 7.9, False): [3, 4, 5, 6, 7],
        (0, 0.005, False): [0, 0.001, 0.002, 0.003, 0.004, 0.005],
        (12, 2000, True): [20, 50, 100, 200, 500, 1000, 2000],
        (0.001, 1e6, True): [10.0**n for n in range(-3, 7)],
        (2.1, 2.4, True): [2.1, 2.15, 2.2, 2.25, 2.3, 2.35, 2.4],  # no power of ten lies between
    }
    calls = ", ".join(f"chooseTicks({low}, {high}, {str(log).lower()}, 6)" for low, high, log in ranges)
    for found, expected in zip(interact(three, f"return [{calls}];"), ranges.values(), strict=True):
        assert found == pytest.approx(expected)


def test_the_page_forbids_itself_to_load_anything(tmp_path):
    text, _ = read_page(write_run(tmp_path / "a", usual(3)), to=tmp_path / "page.html")
    assert "default-src 'none'" in text
    assert not re.search(r"https?://|@import|url\(", text)
    assert MaskedLM.__name__ in text
    assert report._MARK in text
