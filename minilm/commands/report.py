"""`minilm report`: one HTML page about one or several runs. The page needs no network.

`report.css` and `report.js` beside this file are its style and its script.
"""

import json
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from html import escape
from pathlib import Path

from minilm.commands import report_sections as sections
from minilm.commands.charts import (
    COLOURS,
    DARK_COLOURS,
    Panel,
    build_panels,
    chart_data,
    describe_panel,
    draw_swatch,
    write_png,
)
from minilm.commands.report_sections import Rows
from minilm.runs.run_log import LoggedRun, Status, read_runs
from minilm.utils.atomic_files import write_atomically

_MARK = '<meta name="generator" content="minilm report">'
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
# The time between two versions of a live page, which reloads itself.
LIVE_SECONDS = 5.0
# The commands of so many runs are shown at once. Those of more runs need a click.
_FEW_RUNS = 3


def write_report(folders: Sequence[str], output: str = "report.html", *, png: bool = False) -> list[Path]:
    """Write a page about the runs in these folders, and return the paths of the files.

    folders: output folders of runs, or folders that hold such folders. png: also write the curves as a picture beside
    the page. Raise ValueError for a folder without a run, and for an output that cannot be written or that is a file
    other than a report.
    """
    runs = read_runs(folders)
    path = _check_output(output)
    written = [path]
    page = build_page(runs)
    with _explain_unwritable(output):
        if png:
            written.append(path.with_suffix(".png"))
            write_png(written[1], build_panels(runs), [run.name for run in runs])
        write_atomically(path, page)
    return written


def write_live_report(folders: Sequence[str], output: str = "report.html") -> Iterator[tuple[Path, list[LoggedRun]]]:
    """Write the page every few seconds until no run goes on, and yield its path and the runs after each time.

    The page reloads itself. The last version does not. Raise ValueError as `write_report` does.
    """
    path = _check_output(output)
    while True:
        runs = read_runs(folders)
        live = any(run.running for run in runs)
        page = build_page(runs, live=live)
        with _explain_unwritable(output):
            write_atomically(path, page)
        yield path, runs
        if not live:
            return
        time.sleep(LIVE_SECONDS)


def _check_output(output: str) -> Path:
    path = Path(output)
    if path.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--output {output}: the report is an HTML page: give a name that ends in .html")
    with _explain_unwritable(output):
        if path.exists() and _MARK not in path.read_text(encoding="utf-8", errors="replace")[:1000]:
            raise ValueError(f"--output {output} exists and is not a report: choose another name")
    return path


@contextmanager
def _explain_unwritable(output: str) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ValueError(f"--output {output} cannot be written: {error.strerror or error}") from error


def build_page(runs: Sequence[LoggedRun], *, live: bool = False) -> str:
    """Return the page. It escapes all text from the runs, and its content security policy forbids loading anything."""
    names = [run.name for run in runs]
    title = escape(" and ".join(names) if len(names) < 3 else f"{len(names)} runs")
    panels, groups = build_panels(runs), sections.group_seeds(runs)
    data = {**chart_data(runs, panels, groups), "live": LIVE_SECONDS if live else 0}
    setting_title, setting_columns, settings = sections.setting_rows(runs)
    changed = {
        (name, at)
        for name, cells in settings.items()
        for at, cell in enumerate(cells)
        if setting_columns and at and cell != cells[0]
    }
    notes = [f'<p class="note">{escape(run.name)}: {escape(note)}</p>' for run in runs for note in run.notes]
    body = [
        _build_summary(runs[0], title) if len(runs) == 1 else _build_overview(runs, title),
        *notes,
        _section("Results", _table(("", *names), sections.result_rows(runs), sections.best_cells(runs))),
        _section(
            "Means over seeds, with standard deviations",
            _table(("", *(name for name, _ in groups)), sections.seed_rows(runs, groups)),
        ),
        _section("Differences between the runs", _build_comparison(runs, groups)),
        _section("Curves", _build_charts(runs, panels, groups, live=live)),
        _section(setting_title, _table(("", *setting_columns, *names), settings, changed)),
        _section("The ledger", "".join(map(_build_ledger, runs))),
        _section("Samples", _table(("", *names), sections.align([run.samples for run in runs]))),
        _section("Facts", _table(("", *names), sections.fact_rows(runs))),
        _fold("all-settings", "All settings", _table(("", *names), sections.align([run.settings() for run in runs]))),
    ]
    # "<" could end the script element that holds the data.
    content = json.dumps(data, separators=(",", ":"), ensure_ascii=False).replace("<", "\\u003c")
    now = sections.format_time(datetime.now(UTC))
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">{_MARK}\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>\n'
        f"<style>{_build_style()}</style></head>\n<body><main>{''.join(body)}</main>\n"
        f'<footer class="faint">Written by minilm report, {now}.</footer>\n'
        f'<script id="data" type="application/json">{content}</script>\n'
        f"<script>{_read('report.js')}</script></body></html>\n"
    )


def _read(name: str) -> str:
    """Return the content of a file beside this one."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def _build_style() -> str:
    light, dark = (
        " ".join(f"--run{number}: {colour};" for number, colour in enumerate(colours))
        for colours in (COLOURS, DARK_COLOURS)
    )
    return f"{_read('report.css')}:root {{ {light} }}\n@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}\n"


def _section(title: str, content: str) -> str:
    """Return a section with a heading; nothing if it has no content."""
    return content and f"<section><h2>{escape(title)}</h2>{content}</section>\n"


def _fold(name: str, title: str, content: str) -> str:
    """Return content that a click on its title shows; nothing if there is none."""
    return content and f'<details id="{name}"><summary>{escape(title)}</summary>{content}</details>\n'


def _table(heads: Sequence[str], rows: Rows | Sequence[Sequence[str]], bold: Collection[tuple[str, int]] = ()) -> str:
    """Return a table, or an empty string without rows.

    rows: the cells of each row by its name, or with its name in front. bold: the names of rows with the numbers of
    cells to mark in them.
    """
    if not rows:
        return ""
    lines = [[name, *cells] for name, cells in rows.items()] if isinstance(rows, dict) else rows
    head = "".join(f'<th scope="col">{escape(text)}</th>' for text in heads)
    body = ""
    for name, *cells in lines:
        marked = [f"<b>{escape(cell)}</b>" if (name, at) in bold else escape(cell) for at, cell in enumerate(cells)]
        body += f'<tr><th scope="row">{escape(name)}</th>{"".join(f"<td>{cell}</td>" for cell in marked)}</tr>'
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _pill(status: Status) -> str:
    return f'<span class="status {status.kind}">{escape(status.kind)}</span>'


def _build_summary(run: LoggedRun, title: str) -> str:
    """Return the top of a page about one run: how it stands, its main figures, and where they come from."""
    last, best, planned = sections.read_last(run), sections.find_best_figure(run), run.facts.get("steps")
    tiles = []
    if best is not None:
        name, step, value = best
        tiles.append(
            (f"Best {_lower(sections.name_figure(name))}", sections.format_figure(name, value), f"at step {step:,}")
        )
    tiles.append(("Duration", sections.format_duration_of(run), ""))
    of = f"of {planned:,}" if isinstance(planned, int) else ""
    tiles.append(("Steps", f"{run.last_step:,}", ", ".join(filter(None, (of, sections.format_steps_per_second(run))))))
    for key, smaller in (("tokens_per_second", "mfu"), ("memory_gb", "")):
        if key in last:
            rest = f"{sections.format_figure(smaller, last[smaller])} MFU" if smaller in last else ""
            tiles.append((sections.name_figure(key), sections.format_figure(key, last[key]), rest))
    shown = "".join(
        f"<div><dt>{escape(name)}</dt><dd>{escape(value)}{f'<small>{escape(rest)}</small>' * bool(rest)}</dd></div>"
        for name, value, rest in tiles
    )
    facts = {
        "Status": f"{escape(run.status.kind)} {escape(run.status.text)}",
        "Started": escape(sections.format_time(run.started)),
        "Command": f"<code>{escape(run.command)}</code>" if run.command else "not recorded",
        "Hardware": escape(sections.describe_hardware(run)) or "not recorded",
    }
    listed = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts.items())
    return (
        f'<header><h1>{title}</h1>{_pill(run.status)}</header>\n<dl class="tiles">{shown}</dl>'
        f'<dl class="facts">{listed}</dl>\n'
    )


def _lower(title: str) -> str:
    return title[:1].lower() + title[1:]


def _build_overview(runs: Sequence[LoggedRun], title: str) -> str:
    """Return the top of a page about several runs: a row for each, then their hardware and commands."""
    heads = ("Run", "Status", "Best evaluation", "Steps", "Duration", "Speed", "Started")
    body = ""
    for number, run in enumerate(runs):
        best, last = sections.find_best_figure(run), sections.read_last(run)
        figure = "–"
        if best is not None:
            name, step, value = best
            named = _lower(sections.name_figure(name))
            figure = f"<b>{escape(sections.format_figure(name, value))}</b> {escape(named)}, step {step:,}"
        cells = (
            f'{_pill(run.status)} <span class="faint">{escape(run.status.text)}</span>',
            figure,
            f"{run.last_step:,}",
            escape(sections.format_duration_of(run)),
            escape(sections.format_figure("tokens_per_second", last.get("tokens_per_second"))),
            escape(sections.format_time(run.started)),
        )
        name = f"{draw_swatch(number)} {escape(run.name)}"
        body += f'<tr><th scope="row">{name}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
    head = "".join(f'<th scope="col">{text}</th>' for text in heads)
    hardware = dict.fromkeys(sections.describe_hardware(run) or "not recorded" for run in runs)
    commands = "".join(
        f"<dt>{escape(run.name)}</dt><dd><code>{escape(run.command)}</code></dd>" for run in runs if run.command
    )
    is_open = " open" * (len(runs) <= _FEW_RUNS)
    return (
        f'<header><h1>{title}</h1></header><div class="scroll"><table class="overview"><thead><tr>{head}</tr></thead>'
        f'<tbody>{body}</tbody></table></div>\n<p><span class="faint">Hardware</span> {escape("; ".join(hardware))}</p>'
        + f'<details id="commands"{is_open}><summary>Commands</summary><dl class="facts">{commands}</dl></details>\n'
        * bool(commands)
    )


def _build_comparison(runs: Sequence[LoggedRun], groups: Sequence[tuple[str, list[int]]]) -> str:
    rows = sections.compare_runs(runs, groups)
    table = _table(("", "Figure", "Difference, with its 95% interval", "p", "Compared"), rows)
    note = "Last evaluations in the ledgers, paired by document (by seed for several seeds), as minilm compare does."
    return table and f'<p class="faint">{note}</p>{table}'


def _build_charts(
    runs: Sequence[LoggedRun], panels: Sequence[Panel], groups: Sequence[tuple[str, list[int]]], *, live: bool
) -> str:
    if not panels:
        return "<p>There is no record of a step yet.</p>" + _build_controls(runs, groups, live=live)
    names = [run.name for run in runs]
    figures = ""
    for number, panel in enumerate(panels):
        figures += (
            f'<figure data-panel="{number}"><figcaption><b class="title">{escape(panel.title)}</b>'
            f'<output aria-live="off"></output></figcaption>'
            f'<svg role="img" aria-label="{escape(describe_panel(panel, names))}"></svg>'
            f'<div class="below"><details id="data-{number}"><summary>Data</summary><div class="scroll"></div>'
            f'</details><button type="button" id="csv-{number}" title="Save the points of this chart as CSV">CSV'
            "</button></div></figure>"
        )
    notes = "A ring marks the best evaluation, and a flag the step after which a run was resumed."
    if any(len(line.curve.steps) > len(line.curve.finite()) for panel in panels for line in panel.lines):
        notes += " Red marks: no finite value."
    return (
        f'{_build_controls(runs, groups, live=live)}<div class="charts">{figures}</div>'
        f'<p class="faint">{notes} A point of a long curve is the mean of several steps, whose range is shaded; '
        "log.jsonl has each step.</p><noscript><p>The charts need JavaScript. The tables do not.</p></noscript>"
    )


def _build_controls(runs: Sequence[LoggedRun], groups: Sequence[tuple[str, list[int]]], *, live: bool) -> str:
    """Return the form with the controls of all charts. `report.js` reads it."""
    items = ""
    if len(runs) > 1:
        for number, run in enumerate(runs):
            name = escape(run.name)
            items += (
                f'<li><input type="checkbox" name="show" value="{number}" id="show-{number}" checked '
                f'aria-label="Show {name}"><button type="button" data-run="{number}" id="run-{number}" '
                f'aria-pressed="false" title="Highlight this run">{draw_swatch(number)}{name}</button></li>'
            )
    seeds = '<label><input type="checkbox" name="seeds" id="seeds" checked>Seeds as mean and range</label>' * bool(
        groups
    )
    reload = (
        f'<label><input type="checkbox" name="live" id="live" checked>Reload every {LIVE_SECONDS:.0f} s</label>' * live
    )
    return (
        f'<form id="controls" aria-label="Settings of the charts">'
        f"{f'<ul class=runs>{items}</ul>' * bool(items)}"
        '<label>Horizontal <select name="x" id="x"><option value="step">steps</option>'
        '<option value="tokens">tokens</option><option value="seconds">training time</option></select></label>'
        '<label>Vertical <select name="y" id="y"><option value="auto">automatic</option>'
        '<option value="linear">linear</option><option value="log">logarithmic</option></select></label>'
        '<label>Smoothing <input type="range" name="smoothing" id="smoothing" min="0" max="0.99" step="0.01" '
        'value="0.6"><output for="smoothing"></output></label>'
        '<label>Read at <input type="range" name="position" id="position" min="0" max="1000" value="1000"></label>'
        f'{seeds}{reload}<input type="hidden" name="highlight"></form>'
    )


def _build_ledger(run: LoggedRun) -> str:
    evaluations, hardest = sections.ledger_rows(run)
    if not evaluations:
        return ""
    heads = ("", "easy (10%)", "median", "hard (90%)", "lower than at first")
    return (
        f'<h3>{escape(run.name)}</h3><p class="faint">Mean loss of the targets of an evaluation example, in nats. '
        f"<code>minilm ledger {escape(str(run.folder))}</code> shows the texts of the hardest ones.</p>"
        f'<div class="pair">{_table(heads, evaluations)}'
        f"{_table(('hardest', 'loss at first', 'loss at last', 'targets'), hardest)}</div>"
    )
