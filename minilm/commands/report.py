"""`minilm report`: one HTML page about one or several runs. The page needs no network."""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import Any

from minilm.commands.charts import COLOURS, DARK_COLOURS, Panel, build_panels, draw_svg, line_style, write_png
from minilm.config import Config
from minilm.config.serialization import from_dict, to_dict
from minilm.runs.run_log import LoggedRun, format_value, read_runs
from minilm.utils.atomic_files import write_atomically

_MARK = '<meta name="generator" content="minilm report">'

_STYLE = """
:root { color-scheme: light dark; --back: #fff; --card: #f6f7f9; --text: #1b1f24; --faint: #5c6570; --rule: #d5d9df;
  --bad: #c0232c; LIGHT }
@media (prefers-color-scheme: dark) {
  :root { --back: #14171b; --card: #1d2127; --text: #e4e7eb; --faint: #9aa4b0; --rule: #39404a; --bad: #ff7a7a;
    DARK } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1240px; padding: 16px; background: var(--back); color: var(--text);
  font: 15px/1.45 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 22px; margin: 0 0 4px; } h2 { font-size: 17px; margin: 28px 0 8px; }
p { margin: 4px 0; } .faint, figcaption output { color: var(--faint); font-size: 13px; }
.legend { position: sticky; top: 0; z-index: 1; background: var(--back); padding: 8px 0; display: flex;
  flex-wrap: wrap; gap: 4px 18px; }
.key { white-space: nowrap; max-width: 100%; overflow: hidden; text-overflow: ellipsis; }
.key svg { width: 26px; height: 10px; margin-right: 6px; }
.key path { stroke-width: 3; }
.charts { display: grid; gap: 14px; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); }
figure { margin: 0; padding: 10px 10px 4px; background: var(--card); border-radius: 8px; }
figcaption b { display: block; font-size: 14px; }
figcaption output { display: block; min-height: 1.45em; font-variant-numeric: tabular-nums; }
figure svg { display: block; width: 100%; height: auto; touch-action: pan-y; }
figure text { fill: var(--faint); font-size: 11.5px; }
figure path { fill: none; } .axis { stroke: var(--faint); } .grid { stroke: var(--rule); stroke-width: .6; }
.bold { stroke-width: 1.8; stroke-linecap: round; stroke-linejoin: round; } .thin { stroke-width: .7; opacity: .4; }
.bad { stroke: var(--bad); stroke-width: 2; } .cursor { stroke: var(--text); stroke-width: 1; opacity: .6; }
.scroll { overflow-x: auto; } table { border-collapse: collapse; font-size: 14px; min-width: min(100%, 520px);
  overflow-wrap: break-word; }
th, td { text-align: left; vertical-align: top; padding: 4px 14px 4px 0; border-bottom: 1px solid var(--rule);
  min-width: 90px; max-width: 420px; }
thead th { white-space: nowrap; } tbody th { font-weight: 400; color: var(--faint); }
@media (max-width: 600px) { tbody th { overflow-wrap: anywhere; min-width: 130px; max-width: 130px; } }
td { font-variant-numeric: tabular-nums; white-space: pre-line; }
.note { color: var(--bad); } summary { cursor: pointer; margin-top: 12px; }
"""

for _word, _colours in (("LIGHT", COLOURS), ("DARK", DARK_COLOURS)):
    _STYLE = _STYLE.replace(_word, " ".join(f"--run{at}: {colour};" for at, colour in enumerate(_colours)))

# All charts show the values of their runs at the step under the pointer or finger.
_SCRIPT = """
const names = [...document.querySelectorAll(".key")].map(key => key.textContent);
const colours = [...document.querySelectorAll(".key path")].map(path => path.style.stroke);
const number = value => value === null ? "not finite" : value && Math.abs(value) < 1e-3 ? value.toExponential(2)
  : value.toLocaleString("en", { maximumSignificantDigits: 5 });
const charts = [...document.querySelectorAll("figure")].map(figure => {
  const svg = figure.querySelector("svg");
  return { svg, data: JSON.parse(svg.dataset.curves), output: figure.querySelector("output"),
           cursor: svg.querySelector(".cursor") };
});
function nearest(steps, step) {
  let low = 0, high = steps.length - 1;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (steps[middle] <= step) low = middle; else high = middle;
  }
  return step - steps[low] <= steps[high] - step ? low : high;
}
function show(step) {
  for (const { data, output, cursor } of charts) {
    output.replaceChildren(step === null ? "last: " : `step ${Math.round(step).toLocaleString("en")}: `);
    for (const curve of data.curves) {
      const at = step === null ? curve.steps.length - 1 : nearest(curve.steps, step);
      const value = document.createElement("span");
      value.textContent = `${names.length > 1 ? "● " : ""}${number(curve.values[at])} `;
      value.title = names[curve.run];
      if (names.length > 1) value.style.color = colours[curve.run];
      output.append(value);
    }
    const x = data.left + (data.right - data.left) * ((step ?? 0) - data.from) / (data.to - data.from);
    cursor.setAttribute("visibility", step === null ? "hidden" : "visible");
    cursor.setAttribute("transform", `translate(${x} 0)`);
  }
}
for (const { svg, data } of charts) {
  svg.addEventListener("pointermove", event => {
    const box = svg.getBoundingClientRect(), width = svg.viewBox.baseVal.width;
    const share = ((event.clientX - box.left) / box.width * width - data.left) / (data.right - data.left);
    show(data.from + Math.min(1, Math.max(0, share)) * (data.to - data.from));
  });
  svg.addEventListener("pointerleave", () => show(null));
}
show(null);
"""


def write_report(folders: Sequence[str], output: str = "report.html", *, png: bool = False) -> list[Path]:
    """Write a page about the runs in these folders, and return the paths of the files.

    png: also write the curves as a picture beside the page. Raise ValueError for a folder without a log, and for an
    output that cannot be written or that is a file other than a report.
    """
    path = Path(output)
    if path.suffix.lower() not in (".html", ".htm"):
        raise ValueError(f"--output {output}: the report is an HTML page: give a name that ends in .html")
    runs = read_runs(folders)
    panels, names = build_panels(runs), [run.name for run in runs]
    written = [path]
    try:
        if path.exists() and _MARK not in path.read_text(encoding="utf-8", errors="replace")[:1000]:
            raise ValueError(f"--output {output} exists and is not a report: choose another name")
        if png:
            written.append(path.with_suffix(".png"))
            write_png(written[1], panels, names)
        write_atomically(path, build_page(runs, panels))
    except OSError as error:
        raise ValueError(f"--output {output} cannot be written: {error.strerror or error}") from error
    return written


def build_page(runs: Sequence[LoggedRun], panels: Sequence[Panel]) -> str:
    """Return the page. It escapes all text from the runs, and its content security policy forbids loading anything."""
    names = [run.name for run in runs]
    title = escape(" and ".join(names) if len(names) < 3 else f"{names[0]} and {len(names) - 1} more runs")
    samples = (
        f'<svg viewBox="0 0 26 10"><path {line_style(number)} d="M0 5H26"/></svg>' for number in range(len(names))
    )
    keys = "".join(
        f'<span class="key">{sample}{escape(name)}</span>' for sample, name in zip(samples, names, strict=True)
    )
    noisy = any(panel.noisy for panel in panels)
    mean = " A bold line is the mean over the last fiftieth of a run's steps." if noisy else ""
    bad = (
        " Red marks: no finite value."
        if any(len(c.finite()) < len(c.values) for p in panels for c in p.curves.values())
        else ""
    )
    charts = "".join(
        f"<figure><figcaption><b>{escape(panel.title)}{' (log scale)' if panel.log else ''}</b><output></output>"
        f"</figcaption>{draw_svg(panel, names)}</figure>"
        for panel in panels
    )
    notes = [f'<p class="note">{escape(run.name)}: {escape(note)}</p>' for run in runs for note in run.notes]
    tables = [
        _build_table("Results", names, _result_rows(runs)),
        _build_table(
            "Settings that differ" if len(runs) > 1 else "Settings other than the defaults", names, _setting_rows(runs)
        ),
        _build_table("Runs", names, _fact_rows(runs)),
        _build_table("Samples", names, _align([run.samples for run in runs])),
        _fold("All settings", _build_table("", names, _align([run.settings() for run in runs]))),
    ]
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'"
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">{_MARK}\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title>\n'
        f"<style>{_STYLE}</style></head>\n<body><h1>{title}</h1>\n"
        f'<p class="faint">Horizontal: steps.{mean}{bad}</p><div class="legend">{keys}</div>\n'
        f'{"".join(notes)}<div class="charts">{charts}</div>\n{"".join(tables)}\n'
        f"<script>{_SCRIPT}</script></body></html>\n"
    )


Rows = dict[str, list[str]]


def _build_table(title: str, names: Sequence[str], rows: Rows) -> str:
    """Return a table with a column for each run, or an empty string without rows."""
    if not rows:
        return ""
    head = "".join(f"<th>{escape(name)}</th>" for name in ("", *names))
    body = "".join(
        f"<tr><th>{escape(name)}</th>{''.join(f'<td>{escape(value)}</td>' for value in values)}</tr>"
        for name, values in rows.items()
    )
    heading = f"<h2>{escape(title)}</h2>" if title else ""
    return f'{heading}<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def _fold(title: str, content: str) -> str:
    """Return content that a click on its title shows; nothing if there is none."""
    return content and f"<details><summary>{escape(title)}</summary>{content}</details>"


def _align(columns: Iterable[dict[str, Any]]) -> Rows:
    """Return a row for each key of any column, as text."""
    columns = list(columns)
    keys = dict.fromkeys(key for column in columns for key in column)
    return {key: [format_value(column.get(key)) for column in columns] for key in keys}


def _result_rows(runs: Sequence[LoggedRun]) -> Rows:
    """Return the rows of all_results.json, or of the last evaluation and step for a run without that file."""
    columns = []
    for run in runs:
        last = {key: curve.values[-1] for key, curve in run.evaluations.items()}
        columns.append(run.results or {**last, "steps": run.last_step})
    return _align(columns)


def _setting_rows(runs: Sequence[LoggedRun]) -> Rows:
    """Return the settings that differ between the runs, or those of a single run that are not the defaults."""
    columns = [run.settings() for run in runs]
    if len(runs) > 1:
        return {key: values for key, values in _align(columns).items() if len(set(values)) > 1}
    config = runs[0].facts.get("config")
    objective = config.get("objective") if isinstance(config, dict) else None
    try:
        default = from_dict({"objective": {"name": objective["name"]}})  # type: ignore[index]
    except (ValueError, TypeError, KeyError):
        default = Config()
    plain = LoggedRun(folder=Path(), name="", facts={"config": to_dict(default)}).settings()
    return {key: [value] for key, value in columns[0].items() if plain.get(key, "–") != value}


def _fact_rows(runs: Sequence[LoggedRun]) -> Rows:
    """Return the facts that each run recorded about its data, model, hardware and versions."""
    columns = []
    for run in runs:
        rest = {key: value for key, value in run.facts.items() if key not in ("config", "sources")}
        flat: dict[str, Any] = {}
        for key, value in rest.items():
            inner = (
                {f"{key}, {name}": part for name, part in value.items()} if isinstance(value, dict) else {key: value}
            )
            flat |= {name.replace("_", " "): part for name, part in inner.items()}
        columns.append({"folder": str(run.folder), **flat})
    return _align(columns)
