"use strict";
// Draws the charts of the page as SVG, from the JSON in #data. The form #controls has all settings. They are also kept
// in the address after "#", so that a reload and a copied address show the same.

const data = JSON.parse(document.getElementById("data").textContent);
const form = document.getElementById("controls");
const control = form.elements;
const TOP = 14, BOTTOM = 26, LEFT = 54, RIGHT = 14;  // pixels between the curves and the edges of a chart

// ---- Numbers

const round = new Intl.NumberFormat("en", { maximumSignificantDigits: 4 });
const precise = new Intl.NumberFormat("en", { maximumSignificantDigits: 5 });
const compact = new Intl.NumberFormat("en", { maximumSignificantDigits: 4, notation: "compact" });

function formatValue(value, panel) {
  if (value === null || value === undefined) return "–";
  if (panel.percent) return `${(100 * value).toPrecision(3)}%`;
  if (value && Math.abs(value) < 1e-3) return value.toExponential(2);
  return round.format(value);
}

function formatTick(value, percent) {
  if (percent) return `${round.format(100 * value)}%`;
  if (value && Math.abs(value) < 1e-3) return value.toExponential().replace("e-", "e−");
  return Math.abs(value) < 1e4 ? precise.format(value) : compact.format(value);
}

function timeUnit(seconds) {
  return seconds > 3 * 3600 ? { name: "hours", size: 3600 } : seconds > 180 ? { name: "minutes", size: 60 }
    : { name: "seconds", size: 1 };
}

function formatPosition(x) {
  if (control.x.value === "seconds") {
    const unit = timeUnit(x);
    return `after ${round.format(x / unit.size)} ${unit.name}`;
  }
  const count = Math.round(x).toLocaleString("en");
  return control.x.value === "tokens" ? `after ${count} tokens` : `step ${count}`;
}

// Round numbers from low to high, about `most` of them.
function chooseTicks(low, high, log, most) {
  if (log) {
    const first = Math.floor(Math.log10(low)), last = Math.ceil(Math.log10(high)), found = [];
    for (let decade = first; decade <= last; decade++) {
      for (const factor of last - first < 4 ? [1, 2, 5] : [1]) found.push(factor * 10 ** decade);
    }
    const inside = found.filter(value => value >= low && value <= high);
    if (inside.length > 1) return inside.filter((_, at) => at % Math.ceil(inside.length / (2 * most)) === 0);
  }
  const raw = (high - low) / most, unit = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 5, 10].map(factor => factor * unit).find(size => size >= raw * 0.999);
  const found = [], rounding = 1e-6;
  for (let n = Math.ceil(low / step - rounding); n <= high / step + rounding; n++) found.push(n * step + 0);  // not -0
  return found;
}

// ---- Curves

// The value at a position, between the two nearest points; null outside of the curve and beside a missing value.
function interpolate(positions, values, position) {
  let low = 0, high = positions.length - 1;
  if (high < 0 || position < positions[low] || position > positions[high]) return null;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (positions[middle] <= position) low = middle; else high = middle;
  }
  const [a, b] = [values[low], values[high]];
  if (position === positions[low] || high === low) return a;
  if (position === positions[high]) return b;
  if (a === null || b === null) return null;
  return a + (b - a) * (position - positions[low]) / (positions[high] - positions[low]);
}

// The exponential moving average. It starts at the first value, without a bias towards 0.
function smoothed(values, weight) {
  let sum = 0, share = 0;
  return values.map(value => {
    if (value === null) return null;
    sum = weight * sum + (1 - weight) * value;
    share = weight * share + 1 - weight;
    return sum / share;
  });
}

function place(run, step) {
  const axis = data.runs[run].axis;
  if (control.x.value === "step") return step;
  const last = axis.step.length - 1;
  return interpolate(axis.step, axis[control.x.value], Math.min(Math.max(step, axis.step[0]), axis.step[last]));
}

function isShown(run) {
  return form.querySelector(`[name=show][value="${run}"]`)?.checked ?? true;
}

// The runs that a run is drawn together with, as seeds; it alone without such a group.
function groupOf(run) {
  const group = control.seeds?.checked && data.groups.find(each => each.runs.includes(run));
  return group ? group.runs.filter(isShown) : [run];
}

// The curves to draw in a chart: those of the runs that are shown. Seeds are joined if the reader wants it.
function curvesOf(panel) {
  const weight = panel.noisy ? Number(control.smoothing.value) : 0;
  const single = panel.curves.filter(curve => isShown(curve.run)).map(curve => {
    const evaluation = curve.part === "evaluation";
    const values = evaluation ? curve.values : smoothed(curve.values, weight);
    const dots = curve.steps.length < 3 || (evaluation && curve.steps.length <= 60);
    return { ...curve, raw: curve.values, values, dots, blurred: weight > 0 && !evaluation,
             xs: curve.steps.map(step => place(curve.run, step)) };
  });
  if (!control.seeds?.checked) return single;
  const grouped = [];
  for (const group of data.groups) {
    for (const part of ["training", "evaluation"]) {
      const members = single.filter(curve => curve.part === part && group.runs.includes(curve.run));
      if (members.length > 1) grouped.push(joinSeeds(group, members, panel.lower ? Math.min : Math.max));
      else grouped.push(...members);
    }
  }
  const inGroup = new Set(data.groups.flatMap(group => group.runs));
  return [...single.filter(curve => !inGroup.has(curve.run)), ...grouped];
}

// The mean of several curves, and the lowest and highest value at each step that all of them have.
function joinSeeds(group, members, choose) {
  const first = members[0], runs = members.map(each => each.run);
  const joined = { ...first, runs, name: group.name, bad: [], blurred: false };
  const rows = first.steps.map((step, at) => {
    const values = members.map(curve => interpolate(curve.steps, curve.values, step));
    return { step, x: first.xs[at], values };
  }).filter(row => !row.values.includes(null));
  joined.steps = rows.map(row => row.step);
  joined.xs = rows.map(row => row.x);
  joined.values = rows.map(row => row.values.reduce((a, b) => a + b, 0) / row.values.length);
  joined.low = rows.map(row => Math.min(...row.values));
  joined.high = rows.map(row => Math.max(...row.values));
  joined.raw = joined.values;
  const best = joined.values.indexOf(choose(...joined.values));
  joined.best = first.best && best >= 0 ? { step: joined.steps[best], value: joined.values[best] } : null;
  return joined;
}

// ---- Drawing

const SVG = document.querySelector("figure svg")?.namespaceURI;

function element(name, attributes, parent, text) {
  const made = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  if (text !== undefined) made.textContent = text;
  parent?.append(made);
  return made;
}

function line(xs, ys) {
  let path = "", drawing = false;
  xs.forEach((x, at) => {
    if (x === null || ys[at] === null) drawing = false;
    else {
      path += `${drawing ? "L" : "M"}${x.toFixed(1)} ${ys[at].toFixed(1)}${drawing ? "" : "h0"}`;
      drawing = true;
    }
  });
  return path;
}

function area(xs, low, high) {
  const kept = xs.map((x, at) => [x, low[at], high[at]]).filter(row => !row.includes(null));
  if (kept.length < 2) return "";
  const point = (x, y) => `${x.toFixed(1)} ${y.toFixed(1)}`;
  const above = kept.map(([x, , y]) => point(x, y)), below = kept.map(([x, y]) => point(x, y)).reverse();
  return `M${[...above, ...below].join("L")}Z`;
}

function verticalRange(panel, curves) {
  const values = curves.flatMap(curve => [...curve.raw, ...(curve.low ?? []), ...(curve.high ?? [])])
    .filter(value => value !== null);
  let low = Math.min(...values), high = Math.max(...values);
  if (!values.length) [low, high] = [0, 1];
  const log = low > 0 && (control.y.value === "log" || (control.y.value === "auto" && panel.log));
  if (log) return { low: low / 1.05, high: high * 1.05, log };
  if (panel.from_zero) low = Math.min(0, low);
  // A curve that only rounding changes is drawn flat.
  const flat = high - low < 1e-3 * Math.abs(high) || high === low;
  const room = 0.05 * (flat ? Math.abs(high) || 1 : high - low);
  return { low: panel.from_zero && low === 0 ? 0 : low - room, high: high + room, log };
}

class Chart {
  constructor(figure) {
    this.figure = figure;
    this.panel = data.panels[Number(figure.dataset.panel)];
    this.svg = figure.querySelector("svg");
    this.output = figure.querySelector("output");
    this.svg.addEventListener("pointermove", event => {
      const box = this.svg.getBoundingClientRect();
      showAt((event.clientX - box.left - LEFT) / (box.width - LEFT - RIGHT));
    });
    this.svg.addEventListener("pointerleave", () => showAt(null));
    figure.querySelector("button").addEventListener("click", () => this.download());
    const table = figure.querySelector("details");
    table.addEventListener("toggle", () => table.open && this.fillTable(table));
  }

  draw() {
    const width = Math.max(240, this.svg.clientWidth), height = this.svg.clientHeight || 220;
    this.curves = curvesOf(this.panel);
    const y = verticalRange(this.panel, this.curves), scale = y.log ? Math.log : Number;
    const bottom = height - BOTTOM, right = width - RIGHT;
    const toX = x => x === null ? null : LEFT + (right - LEFT) * x / lastX;
    const share = value => (scale(value) - scale(y.low)) / (scale(y.high) - scale(y.low));
    const toY = value => value === null ? null : bottom - (bottom - TOP) * share(value);
    this.svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
    this.svg.replaceChildren();
    for (const tick of chooseTicks(y.low, y.high, y.log, height / 45)) {
      element("path", { class: "grid", d: `M${LEFT} ${toY(tick).toFixed(1)}H${right}` }, this.svg);
      const at = { x: LEFT - 7, y: (toY(tick) + 4).toFixed(1), "text-anchor": "end" };
      element("text", at, this.svg, formatTick(tick, this.panel.percent));
    }
    const unit = control.x.value === "seconds" ? timeUnit(lastX) : { name: "", size: 1 };
    for (const tick of chooseTicks(0, lastX / unit.size, false, width / 90)) {
      if (control.x.value !== "seconds" && !Number.isInteger(tick)) continue;
      const x = toX(tick * unit.size);
      const anchor = x > right - 12 ? "end" : "middle";
      const at = { x: Math.min(x, right).toFixed(1), y: height - 8, "text-anchor": anchor };
      element("text", at, this.svg, formatTick(tick, false));
    }
    element("path", { class: "axis", d: `M${LEFT} ${TOP - 6}V${bottom}H${right}` }, this.svg);
    for (const curve of this.curves) this.drawCurve(curve, toX, toY, bottom);
    this.drawResumes(toX, bottom);
    this.cursor = element("path", { class: "cursor", d: `M0 ${TOP - 6}V${bottom}`, visibility: "hidden" }, this.svg);
    this.span = [LEFT, right];
  }

  drawCurve(curve, toX, toY, bottom) {
    const { colour, dashes } = data.runs[curve.run];
    const xs = curve.xs.map(toX), runs = (curve.runs ?? [curve.run]).join(" ");
    const group = element("g", { "data-runs": runs, style: `--own: ${colour}` }, this.svg);
    if (curve.low) element("path", { class: "band", d: area(xs, curve.low.map(toY), curve.high.map(toY)) }, group);
    if (curve.blurred && !curve.low) element("path", { class: "thin", d: line(xs, curve.raw.map(toY)) }, group);
    const kind = curve.part === "evaluation" && this.panel.parts > 1 ? "bold evaluation" : "bold";
    element("path", { class: kind, "stroke-dasharray": dashes, d: line(xs, curve.values.map(toY)) }, group);
    if (curve.dots) {
      curve.values.forEach((value, at) => {
        if (value === null) return;
        const spot = { class: kind.replace("bold", "dot"), r: 3.2, cx: xs[at].toFixed(1), cy: toY(value).toFixed(1) };
        element("circle", spot, group);
      });
    }
    for (const step of curve.bad) {
      element("path", { class: "bad", d: `M${toX(place(curve.run, step)).toFixed(1)} ${bottom - 9}v9` }, group);
    }
    if (curve.best) {
      const x = toX(place(curve.run, curve.best.step)), y = toY(curve.best.value);
      const at = { class: "best", r: 6.5, cx: x.toFixed(1), cy: y.toFixed(1) };
      element("title", {}, element("circle", at, group), `best: ${formatValue(curve.best.value, this.panel)}`);
    }
  }

  drawResumes(toX, bottom) {
    data.runs.forEach((run, number) => {
      if (!isShown(number) || !this.panel.curves.some(curve => curve.run === number)) return;
      for (const step of run.resumed) {
        const x = toX(place(number, step)).toFixed(1);
        const group = element("g", { "data-runs": number, style: `--own: ${run.colour}` }, this.svg);
        element("path", { class: "resumed", d: `M${x} ${TOP}V${bottom}` }, group);
        element("path", { class: "flag", d: `M${x} ${TOP - 8}l9 5l-9 5z` }, group);
        element("title", {}, group, `${run.name} resumed after step ${step}`);
      }
    });
  }

  // Show the values at a share of the width, or the last ones.
  show(share) {
    const x = share * lastX, panel = this.panel;
    this.output.replaceChildren(share === null ? "last: " : `${formatPosition(x)}: `);
    for (const curve of this.curves) {
      const value = share === null ? curve.values.findLast(each => each !== null)
        : curve.dots ? nearest(curve, x) : interpolate(curve.xs, curve.values, x);
      const entry = document.createElement("span"), mark = document.createElement("b");
      mark.style.color = data.runs[curve.run].colour;
      mark.textContent = curve.part === "evaluation" && panel.parts > 1 ? "○ " : "● ";
      const name = curve.name ?? data.runs[curve.run].name;
      entry.title = `${name}, ${curve.part}`;
      entry.append(mark, formatValue(value, panel), panel.parts > 1 ? ` ${curve.part}` : "");
      this.output.append(entry, " ");
    }
    this.cursor.setAttribute("visibility", share === null ? "hidden" : "visible");
    this.cursor.setAttribute("transform", `translate(${this.span[0] + (this.span[1] - this.span[0]) * share} 0)`);
  }

  // The points of the chart as rows, the first of them the names of the columns.
  rows() {
    const rows = [["run", "part", "step", "tokens", "seconds", "value", "low", "high"]];
    for (const curve of this.panel.curves.filter(each => isShown(each.run))) {
      const { name, axis } = data.runs[curve.run];
      curve.steps.forEach((step, at) => {
        const [tokens, seconds] = [axis.tokens, axis.seconds].map(values => interpolate(axis.step, values, step));
        const value = curve.values[at];
        rows.push([name, curve.part, step, tokens === null ? null : Math.round(tokens), seconds, value,
                   curve.low?.[at] ?? value, curve.high?.[at] ?? value]);
      });
    }
    return rows;
  }

  download() {
    const quote = cell => typeof cell === "string" ? `"${cell.replaceAll('"', '""')}"` : cell ?? "";
    const text = this.rows().map(row => row.map(quote).join(",") + "\n").join("");
    const link = document.createElement("a");
    link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
    link.download = `${this.panel.key}.csv`;
    link.click();
    setTimeout(() => URL.revokeObjectURL(link.href), 1000);
  }

  fillTable(details) {
    const table = document.createElement("table");
    this.rows().forEach((row, at) => {
      const tr = table.insertRow();
      for (const cell of row.slice(0, 6)) {
        const made = document.createElement(at ? "td" : "th");
        made.textContent = typeof cell === "number" ? round.format(cell) : cell ?? "–";
        tr.append(made);
      }
    });
    details.querySelector(".scroll").replaceChildren(table);
  }
}

// The value of the point that is nearest to a position; null outside of the curve.
function nearest(curve, x) {
  const distances = curve.xs.map(each => Math.abs(each - x)), least = Math.min(...distances);
  return curve.values[distances.indexOf(least)] ?? null;
}

// ---- The page

let lastX = 1;
const charts = [...document.querySelectorAll("figure")].map(figure => new Chart(figure));

function showAt(share) {
  const chosen = Number(control.position.value) / 1000;
  const at = share === null ? (chosen < 1 ? chosen : null) : Math.min(1, Math.max(0, share));
  for (const chart of charts) chart.show(at);
}

function highlight(run) {
  for (const group of document.querySelectorAll("g[data-runs]")) {
    group.classList.toggle("faded", run !== "" && !group.dataset.runs.split(" ").includes(run));
  }
}

function draw() {
  lastX = Math.max(1e-9, ...data.runs.map((run, at) => isShown(at) ? place(at, run.axis.step.at(-1) ?? 0) ?? 0 : 0));
  control.smoothing.nextElementSibling.value = Number(control.smoothing.value).toFixed(2);
  for (const chart of charts) chart.draw();
  for (const button of form.querySelectorAll("button[data-run]")) {
    button.setAttribute("aria-pressed", button.dataset.run === control.highlight.value);
  }
  document.querySelectorAll(".swatch[data-run]").forEach(swatch => {
    const [first] = groupOf(Number(swatch.dataset.run));
    swatch.style.setProperty("--own", data.runs[first ?? swatch.dataset.run].colour);
  });
  highlight(control.highlight.value);
  showAt(null);
}

function settings() {
  const kept = new URLSearchParams();
  for (const name of ["x", "y", "smoothing", "position"]) kept.set(name, control[name].value);
  for (const name of ["seeds", "live"]) if (control[name]) kept.set(name, Number(control[name].checked));
  if (control.highlight.value) kept.set("highlight", data.runs[control.highlight.value].name);
  for (const box of form.querySelectorAll("[name=show]:not(:checked)")) kept.append("hide", data.runs[box.value].name);
  return kept;
}

function restore() {
  const kept = new URLSearchParams(location.hash.slice(1));
  for (const name of ["x", "y", "smoothing", "position"]) if (kept.has(name)) control[name].value = kept.get(name);
  for (const name of ["seeds", "live"]) {
    if (control[name] && kept.has(name)) control[name].checked = kept.get(name) === "1";
  }
  const highlighted = data.runs.findIndex(run => run.name === kept.get("highlight"));
  control.highlight.value = highlighted < 0 ? "" : highlighted;
  const hidden = kept.getAll("hide");
  for (const box of form.querySelectorAll("[name=show]")) box.checked = !hidden.includes(data.runs[box.value].name);
  for (const id of history.state?.open ?? []) document.getElementById(id)?.setAttribute("open", "");
  document.getElementById(history.state?.focus)?.focus({ preventScroll: true });
}

function keep() {
  const open = [...document.querySelectorAll("details[open][id]")].map(each => each.id);
  history.replaceState({ open, focus: document.activeElement.id }, "", `#${settings()}`);
}

restore();
draw();
form.addEventListener("input", () => { draw(); keep(); });
form.addEventListener("submit", event => event.preventDefault());
for (const button of form.querySelectorAll("button[data-run]")) {
  button.addEventListener("click", () => {
    control.highlight.value = control.highlight.value === button.dataset.run ? "" : button.dataset.run;
    draw();
    keep();
  });
  button.closest("li").addEventListener("pointerenter", () => highlight(button.dataset.run));
  button.closest("li").addEventListener("pointerleave", () => highlight(control.highlight.value));
}
new ResizeObserver(draw).observe(document.querySelector(".charts") ?? document.body);
// A wide table scrolls in its own box, which the arrow keys can only reach if it takes the focus.
for (const box of document.querySelectorAll(".scroll")) if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
if (data.live) {
  setInterval(() => {
    if (!control.live.checked || document.querySelector(":active:is(input, select, button)")) return;
    keep();
    location.reload();
  }, 1000 * data.live);
}
