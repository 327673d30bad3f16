"use strict";
// Fills the page from the JSON in #data. Texts of models and data enter only through textContent.
const data = JSON.parse(document.getElementById("data").textContent);
const palette = ["#2f6fde", "#e07b26", "#1f9e78", "#c2498f", "#7d5fd3", "#b08a1e", "#3aa6c9", "#8b5a3c"];
const phaseColours = { waiting: "#c9ced8", "weight push": "#e0a526", sampling: "#5b8ff0", grading: "#b48ae0", packing: "#6cc7c4", training: "#2e9e6b", other: "#a7b0bf" };
const dashes = ["solid", "dashed", "dotted"];
const hidden = new Set();
const shown = new Map(); // element -> {chart, draw}
const byId = (id) => document.getElementById(id);
const style = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const colourOf = (index) => palette[index % palette.length];

function element(tag, options = {}, ...children) {
  const { class: className, style: css, ...rest } = options;
  const made = Object.assign(document.createElement(tag), rest);
  if (className) made.className = className;
  if (css) made.style.cssText = css;
  made.append(...children.filter((child) => child !== null && child !== undefined));
  return made;
}

const dot = (index) => element("span", { class: "dot", style: `background:${colourOf(index)}` });

function number(value, unit = "") {
  if (value === null || value === undefined) return "-";
  if (unit === "%") return `${(100 * value).toPrecision(3).replace(/\.0+$/, "")} %`;
  const size = Math.abs(value);
  for (const [scale, letter] of [[1e12, "T"], [1e9, "B"], [1e6, "M"], [1e4, "k"]])
    if (size >= scale) return `${+(value / (letter === "k" ? 1e3 : scale)).toPrecision(3)}${letter}`;
  if (size !== 0 && size < 1e-3) return value.toExponential(1);
  return `${+value.toPrecision(4)}`;
}

function duration(hours) {
  const seconds = hours * 3600;
  if (seconds < 120) return `${seconds.toFixed(0)} s`;
  if (seconds < 7200) return `${(seconds / 60).toFixed(1)} min`;
  return `${hours.toFixed(1)} h`;
}

// ---- summary

function headlineTable() {
  const anyGpu = data.runs.some((run) => run.headline.has_gpus);
  const names = ["run", "held-out accuracy", "at the start", "change", "steps", "tokens", "time in steps", anyGpu ? "GPU hours" : "rank hours"];
  const rows = data.runs.map((run, index) => {
    const { headline: top, curves } = run;
    const accuracy = element("td"), start = element("td"), changes = element("td");
    for (const { name, points } of curves.evaluations) {
      const first = points[0], last = points.at(-1), label = name ? `${name} ` : "";
      const change = last.step > first.step ? 100 * (last.accuracy - first.accuracy) : null;
      accuracy.append(element("div", {}, label, element("b", {}, number(last.accuracy, "%")),
        element("small", {}, `95 %: ${number(last.low, "%")} to ${number(last.high, "%")}, ${last.problems} problems, after step ${last.step}`)));
      start.append(element("div", {}, label, first.step === 0 ? number(first.accuracy, "%") : "-"));
      changes.append(element("div", { class: change === null ? "" : change >= 0 ? "up" : "down" }, label, change === null ? "-" : `${change >= 0 ? "+" : ""}${change.toFixed(1)} points`));
    }
    if (!curves.evaluations.length) {
      accuracy.append("not evaluated");
      start.append("-");
      changes.append("-");
    }
    const steps = element("td", {}, `${top.steps}${top.planned ? ` of ${top.planned}` : ""}`);
    if (top.planned)
      steps.append(element("span", { class: "progress" }, element("i", { style: `width:${Math.min(100, (100 * top.steps) / top.planned)}%` })));
    return element("tr", {},
      element("td", {}, dot(index), run.name, element("small", { style: "padding-left:19px" }, top.method)),
      accuracy, start, changes, steps,
      element("td", {}, number(top.tokens)),
      element("td", {}, duration(top.hours)),
      element("td", {}, top.processor_hours < 1 ? top.processor_hours.toFixed(3) : number(top.processor_hours)));
  });
  byId("headline").append(element("div", { class: "scroll" }, element("table", {},
    element("thead", {}, element("tr", {}, ...names.map((name) => element("th", {}, name)))), element("tbody", {}, ...rows))));
}

function suites() {
  const rows = data.runs.flatMap((run, index) => run.suites.map((row) => element("tr", {},
    element("td", {}, dot(index), run.name, element("small", { style: "padding-left:19px" }, row.policy)),
    element("td", {}, row.suite), element("td", {}, row.benchmark), element("td", {}, row.metric),
    element("td", {}, row.value === null ? "-" : element("b", {}, number(row.value, "%"))),
    element("td", {}, row.value === null ? "-" : `${number(row.low, "%")} to ${number(row.high, "%")}`),
    element("td", {}, `${row.problems ?? "-"}`))));
  if (!rows.length) return;
  const names = ["evaluated on a suite", "suite", "benchmark", "metric", "value", "95 % interval", "problems"];
  byId("suites").append(element("div", { class: "scroll" }, element("table", {},
    element("thead", {}, element("tr", {}, ...names.map((name) => element("th", {}, name)))), element("tbody", {}, ...rows))));
}

function warnings() {
  const place = byId("warnings");
  data.runs.forEach((run, index) => (run.warnings ?? []).forEach((warning) =>
    place.append(element("div", { class: "warning" },
      element("div", {}, data.runs.length > 1 ? dot(index) : null, data.runs.length > 1 ? ` ${run.name}, ` : "", `step ${warning.step}: `, element("b", {}, warning.saw)),
      element("p", {}, `${warning.why} Look at `, ...warning.look_at.flatMap((name, place) => [place ? ", " : "", element("code", {}, name)]), ".")))));
  if (!place.children.length && data.runs.every((run) => run.warnings)) place.append(element("p", { class: "fine" }, "No warnings."));
}

function chips() {
  if (data.runs.length < 2) return;
  data.runs.forEach((run, index) => {
    const chip = element("button", { class: "chip", type: "button", title: "show or hide this run" }, element("i", { style: `background:${colourOf(index)}` }), run.name);
    chip.onclick = () => {
      hidden.has(index) ? hidden.delete(index) : hidden.add(index);
      chip.classList.toggle("off", hidden.has(index));
      redraw();
    };
    byId("chips").append(chip);
  });
}

// ---- curves

function smooth(values, weight) {
  // An exponential moving average without the bias of its start (Adam, arXiv 1412.6980, section 3). Gaps stay gaps.
  let sum = 0, share = 0;
  return values.map((value) => {
    if (value === null) return null;
    sum = weight * sum + (1 - weight) * value;
    share = weight * share + (1 - weight);
    return sum / share;
  });
}

const axis = () => byId("axis").value;
const along = (run, values) => run.curves.x[axis()].map((x, index) => [x, values[index]]);
const axisNumber = (value) => (axis() === "hours" ? duration(value) : number(value));

function base(unit, log) {
  const quiet = style("--quiet"), line = style("--line");
  return {
    animation: false,
    aria: { enabled: true },
    grid: { left: 8, right: 14, top: 26, bottom: 4, outerBoundsMode: "same", outerBoundsContain: "axisLabel" },
    textStyle: { fontFamily: "inherit" },
    xAxis: { type: "value", min: "dataMin", max: "dataMax", axisLabel: { color: quiet, formatter: axisNumber, hideOverlap: true, showMinLabel: false, showMaxLabel: false }, axisLine: { lineStyle: { color: line } }, axisTick: { show: false }, splitLine: { show: false } },
    yAxis: { type: log ? "log" : "value", scale: true, axisLine: { show: false }, axisTick: { show: false }, axisLabel: { color: quiet, formatter: (value) => number(value, unit) }, splitLine: { lineStyle: { color: line } } },
    dataZoom: [{ type: "inside", filterMode: "none", zoomOnMouseWheel: "ctrl", moveOnMouseWheel: false }],
    toolbox: { right: 2, top: -4, itemSize: 12, iconStyle: { borderColor: quiet, opacity: 0.6 }, feature: { dataZoom: { yAxisIndex: false, filterMode: "none", title: { zoom: "enlarge", back: "back" } }, saveAsImage: { title: "save as PNG", pixelRatio: 2, backgroundColor: style("--card") } } },
    tooltip: { trigger: "axis", confine: true, transitionDuration: 0, axisPointer: { lineStyle: { color: quiet } }, backgroundColor: style("--card"), borderColor: line, textStyle: { color: style("--ink"), fontSize: 12 }, formatter: tooltip(unit) },
  };
}

const tooltip = (unit) => (items) => {
  const box = element("div");
  const listed = items.filter((item) => item.seriesId.startsWith("main|") && item.value[1] !== null && item.value[1] !== undefined);
  if (!listed.length) return "";
  box.append(element("div", { style: `color:${style("--quiet")}` }, axis() === "step" ? `after step ${listed[0].value[0]}` : axisNumber(listed[0].value[0]) + (axis() === "tokens" ? " tokens" : "")));
  for (const item of listed) {
    const extra = item.data.note ? ` (${item.data.note})` : "";
    box.append(element("div", {}, element("span", { class: "dot", style: `background:${item.color};margin-right:7px` }), `${item.seriesName}  `, element("b", {}, number(item.data.measured ?? item.value[1], unit)), extra));
  }
  return box;
};

// A logarithmic axis only where there is something to see on it.
function wantsLog(chart) {
  if (!chart.log) return false;
  const values = data.runs.flatMap((run) => chart.metrics.flatMap((metric) => run.curves.series[metric]?.mean ?? [])).filter((value) => value > 0);
  return Math.max(...values) > 20 * Math.min(...values);
}

function curveSeries(chart, log) {
  const weight = +byId("smoothing").value;
  const found = [];
  data.runs.forEach((run, index) => {
    if (hidden.has(index)) return;
    chart.metrics.forEach((metric, place) => {
      const series = run.curves.series[metric];
      if (!series) return;
      const positive = (value) => (log && value !== null && value <= 0 ? null : value);
      const several = data.runs.length > 1 || chart.metrics.length === 1;
      const colour = several ? colourOf(index) : colourOf(place);
      const name = [data.runs.length > 1 ? run.name : "", chart.metrics.length > 1 || data.runs.length === 1 ? metric : ""].filter(Boolean).join(" ");
      const faint = series.low
        ? run.curves.x[axis()].flatMap((x, at) => [[x, positive(series.low[at])], [x, positive(series.high[at])]])
        : along(run, series.mean.map(positive));
      const line = { type: "line", showSymbol: series.mean.length === 1, connectNulls: false, symbolSize: 5, itemStyle: { color: colour } };
      if (weight > 0 || series.low)
        found.push({ ...line, id: `faint|${index}|${metric}`, name, data: faint, silent: true, z: 1, lineStyle: { width: 1, color: colour, opacity: 0.32 }, emphasis: { disabled: true } });
      const averaged = smooth(series.mean.map(positive), weight);
      found.push({ ...line, id: `main|${index}|${metric}`, name, z: 3, lineStyle: { width: 2, color: colour, type: dashes[place % dashes.length] }, emphasis: { disabled: true },
        data: run.curves.x[axis()].map((x, at) => ({ value: [x, averaged[at]], measured: series.mean[at], note: weight > 0 ? `average ${number(averaged[at], chart.unit)}` : "" })) });
    });
  });
  return found;
}

// One line with its interval for each set. With several runs a colour is a run, and a dash a set.
function accuracySeries(sets) {
  const single = data.runs.length === 1, found = [];
  data.runs.forEach((run, index) => {
    if (hidden.has(index)) return;
    for (const { name: set, points } of run.curves.evaluations) {
      const place = sets.indexOf(set), colour = colourOf(single ? place : index), id = `${index}|${set}`;
      const name = [single && set ? "" : run.name, set].filter(Boolean).join(" ");
      const band = { type: "line", symbol: "none", silent: true, stack: `band ${id}`, stackStrategy: "all", lineStyle: { opacity: 0 }, emphasis: { disabled: true }, z: 1, itemStyle: { color: colour } };
      found.push({ ...band, id: `low|${id}`, name, data: points.map((point) => [point[axis()], point.low]) });
      found.push({ ...band, id: `band|${id}`, name, areaStyle: { color: colour, opacity: 0.13 }, data: points.map((point) => [point[axis()], point.high - point.low]) });
      found.push({ type: "line", id: `main|${id}`, name, z: 3, symbol: "circle", symbolSize: 7, itemStyle: { color: colour }, lineStyle: { width: 2, color: colour, type: single ? "solid" : dashes[place % dashes.length] }, emphasis: { disabled: true },
        data: points.map((point) => ({ value: [point[axis()], point.accuracy], note: `${number(point.low, "%")} to ${number(point.high, "%")}` })) });
    }
  });
  return found;
}

// One line for each source or benchmark. With several runs a colour is a run, and a dash a source or benchmark.
function lineSeries(title, names) {
  const single = data.runs.length === 1;
  return data.runs.flatMap((run, index) => (hidden.has(index) ? [] : Object.entries(run.curves.lines[title] ?? {}).map(([name, points]) => {
    const place = names.indexOf(name), colour = colourOf(single ? place : index);
    return { type: "line", id: `main|${index}|${name}`, name: single ? name : `${run.name} ${name}`, symbol: "circle", symbolSize: 6, itemStyle: { color: colour }, emphasis: { disabled: true },
      lineStyle: { width: 2, color: colour, type: single ? "solid" : dashes[place % dashes.length] }, data: points.map((point) => ({ value: [point[axis()], point.value] })) };
  })));
}

const phaseSeries = (run) => Object.entries(run.curves.phases).map(([phase, seconds]) => ({
  type: "line", id: `main|${phase}`, name: phase, stack: "seconds", symbol: "none", lineStyle: { width: 0 }, areaStyle: { opacity: 0.85, color: phaseColours[phase] }, itemStyle: { color: phaseColours[phase] }, emphasis: { disabled: true }, data: along(run, seconds) }));

function card(title, help, now) {
  const canvas = element("div", { class: "canvas" });
  return [element("div", { class: "card" }, element("h4", {}, title, element("span", {}, now ?? "")), element("p", { title: help }, help), canvas), canvas];
}

const watcher = new IntersectionObserver((entries) => entries.forEach((entry) => {
  if (!entry.isIntersecting) return;
  watcher.unobserve(entry.target);
  const item = shown.get(entry.target);
  item.chart = echarts.init(entry.target);
  item.draw(item.chart);
}), { rootMargin: "400px" });

function place(grid, title, help, draw, now) {
  const [box, canvas] = card(title, help, now);
  grid.append(box);
  shown.set(canvas, { draw, chart: null });
  watcher.observe(canvas);
}

const helpOfLines = {
  "Held-out accuracy by source": "On each source of the held-out problems.",
  "Metrics of the evaluation sets": "Of each set of evaluation.sets: its name and its metric.",
};
const dashed = (names) => `${names.map((name, at) => `${dashes[at % dashes.length]}: ${name}`).join(", ")}. `;
const legendOf = (series) => ({ legend: { type: "scroll", left: 0, right: 76, top: 0, itemHeight: 8, itemWidth: 18, textStyle: { color: style("--quiet") }, data: [...new Set(series.map((one) => one.name))] } });

function charts() {
  const groups = new Map();
  const grid = (group) => {
    if (!groups.has(group)) {
      const made = element("div", { class: "grid" });
      if (group === "More")
        byId("charts").append(element("details", { style: "margin-top:22px" }, element("summary", {}, "more numbers"), made));
      else byId("charts").append(element("h3", {}, group), made);
      groups.set(group, made);
    }
    return groups.get(group);
  };
  const single = data.runs.length === 1;
  const last = (values) => (values ?? []).findLast((value) => value !== null);
  const sets = [...new Set(data.runs.flatMap((run) => run.curves.evaluations.map((set) => set.name)))];
  if (sets.length) {
    const now = single && sets.length === 1 ? number(data.runs[0].curves.evaluations[0].points.at(-1).accuracy, "%") : "";
    const lines = !single && sets.length > 1 ? dashed(sets.map((set) => set || "data.evaluation")) : "";
    const help = sets.some(Boolean) ? "On each set of evaluation.sets, with the 95 % interval." : "On data.evaluation, with the 95 % interval.";
    place(grid("Learning"), "Held-out accuracy", lines + help, (chart) => {
      const series = accuracySeries(sets);
      chart.setOption({ ...base("%", false), ...(single && sets.length > 1 ? legendOf(series) : {}), series }, true);
    }, now);
  }
  for (const title of new Set(data.runs.flatMap((run) => Object.keys(run.curves.lines)))) {
    const names = [...new Set(data.runs.flatMap((run) => Object.keys(run.curves.lines[title] ?? {})))];
    const help = title.startsWith("Suite ") ? "Checkpoints that were evaluated on a suite." : helpOfLines[title];
    place(grid("Learning"), title, (single ? "" : dashed(names)) + help, (chart) => {
      const series = lineSeries(title, names);
      chart.setOption({ ...base("%", false), ...(single ? legendOf(series) : {}), series }, true);
    });
  }
  for (const spec of data.charts) {
    const now = single && spec.metrics.length === 1 ? number(last(data.runs[0].curves.series[spec.metrics[0]]?.mean), spec.unit) : "";
    const several = single && spec.metrics.filter((metric) => data.runs[0].curves.series[metric]).length > 1;
    const lines = !single && spec.metrics.length > 1 ? dashed(spec.metrics) : "";
    place(grid(spec.group), spec.title, lines + spec.help, (chart) => {
      const log = wantsLog(spec), series = curveSeries(spec, log);
      const legend = several ? legendOf(series) : {};
      chart.setOption({ ...base(spec.unit, log), ...legend, series }, true);
    }, now);
  }
  data.runs.forEach((run, index) => {
    if (!Object.keys(run.curves.phases).length) return;
    place(grid("Speed"), single ? "Time of a step" : `Time of a step: ${run.name}`, "Seconds by phase. Waiting is for answers that are sampled ahead.", (chart) =>
      chart.setOption({ ...base("", false), grid: { ...base().grid, top: 44 }, toolbox: { ...base().toolbox, top: 10 }, legend: { left: 0, right: 76, top: 0, itemHeight: 9, itemWidth: 9, icon: "circle", itemGap: 9, textStyle: { color: style("--quiet"), fontSize: 11 } }, series: phaseSeries(run) }, true));
  });
}

function redraw() {
  byId("smoothed").textContent = (+byId("smoothing").value).toFixed(2);
  for (const { chart, draw } of shown.values()) if (chart) draw(chart);
}

// ---- answers

const browser = { entries: [], entry: null, prompt: null };

function rewardBadge(reward, error) {
  if (reward === null || reward === undefined) return element("span", { class: "badge", style: "background:#8a93a3" }, error ? "grading failed" : "no reward");
  const share = Math.max(0, Math.min(1, reward));
  return element("span", { class: "badge", style: `background:hsl(${6 + 144 * share} 55% 38%)` }, `reward ${number(reward)}`);
}

function answerText(answer) {
  const box = element("pre");
  if (!byId("colours").checked || !answer.tokens) {
    box.textContent = answer.text;
    return box;
  }
  for (const [text, logprob] of answer.tokens) {
    const strength = Math.min(1, -logprob / 4);
    box.append(element("span", { title: `log-prob ${logprob.toFixed(3)}, p ${Math.exp(logprob).toFixed(3)}`, style: strength > 0.01 ? `background:rgba(224,123,38,${(0.75 * strength).toFixed(2)});border-radius:3px` : "" }, text));
  }
  return box;
}

const answerBox = (answer) => element("div", { class: "answer" },
  element("div", { class: "label" }, rewardBadge(answer.reward, answer.error), element("span", {}, `${answer.tokens_n ?? "?"} tokens`),
    answer.finish === "length" ? element("span", { class: "down" }, "cut off") : null,
    answer.logprob !== null && answer.logprob !== undefined ? element("span", {}, `mean log-prob ${answer.logprob.toFixed(2)}`) : null,
    answer.error ? element("span", { class: "down" }, answer.error) : null),
  answerText(answer));

const promptBox = (prompt) => element("div", { class: "prompt" },
  element("div", { class: "label" }, prompt.is_rendered ? "prompt, as the model sees it" : "last message of the prompt"),
  element("pre", {}, prompt.text), element("div", { class: "label", style: "margin-top:8px" }, `ground truth: ${prompt.truth}`));

function answersOf(prompt) {
  const left = prompt.num_answers - prompt.answers.length;
  return [...prompt.answers.map(answerBox), left > 0 ? element("p", { class: "fine" }, `${left} more in samples/`) : null];
}

function showAnswers() {
  const place = byId("answers");
  place.replaceChildren();
  const prompt = browser.entry?.prompts.find((one) => one.id === browser.prompt);
  if (!prompt) return;
  place.append(promptBox(prompt));
  if (!byId("over-time").checked) return place.append(...answersOf(prompt).filter(Boolean));
  for (const entry of browser.entries) {
    const then = entry.prompts.find((one) => one.id === browser.prompt);
    if (then) place.append(element("div", { class: "step" }, stepName(entry)), ...answersOf(then).filter(Boolean));
  }
}

const stepName = (entry) => (entry.kind === "step" ? `step ${entry.step}` : entry.step === 0 ? "before training" : `after step ${entry.step}`);

function showPrompts() {
  const { entry } = browser;
  if (!entry.prompts.some((one) => one.id === browser.prompt)) browser.prompt = entry.prompts[0]?.id ?? null;
  byId("sample-step-name").textContent = stepName(entry);
  byId("prompts").replaceChildren(...entry.prompts.map((prompt) => {
    const item = element("li", { class: prompt.id === browser.prompt ? "chosen" : "" }, element("span", {}, prompt.id), rewardBadge(prompt.reward), element("small", {}, prompt.text.trim().slice(-160)));
    item.onclick = () => { browser.prompt = prompt.id; showPrompts(); };
    return item;
  }));
  showAnswers();
}

function showEntry() {
  browser.entry = browser.entries[+byId("sample-step").value] ?? browser.entries.at(-1);
  if (browser.entry) showPrompts();
}

function showKind() {
  const run = data.runs[+byId("sample-run").value];
  browser.entries = run.samples.filter((entry) => entry.kind === byId("sample-kind").value);
  const slider = byId("sample-step");
  slider.max = Math.max(0, browser.entries.length - 1);
  slider.value = slider.max;
  showEntry();
}

function showRun() {
  const run = data.runs[+byId("sample-run").value];
  const kinds = [...new Set(run.samples.map((entry) => entry.kind))];
  const names = { evaluation: "held-out problems", step: "training steps" };
  byId("sample-kind").replaceChildren(...kinds.map((kind) => element("option", { value: kind }, names[kind])));
  showKind();
}

function answers() {
  const withSamples = data.runs.map((run, index) => [run, index]).filter(([run]) => run.samples.length);
  if (!withSamples.length) return byId("samples").remove();
  byId("of-run").hidden = withSamples.length === 1;
  if (byId("of-run").hidden) byId("of-run").style.display = "none";
  byId("sample-run").append(...withSamples.map(([run, index]) => element("option", { value: index }, run.name)));
  byId("sample-run").onchange = showRun;
  byId("sample-kind").onchange = showKind;
  byId("sample-step").oninput = showEntry;
  byId("over-time").onchange = showAnswers;
  byId("colours").onchange = showAnswers;
  showRun();
}

// ---- settings

function settings() {
  const { columns, rows } = data.settings;
  const heads = columns.map((name, index) => element("th", {}, data.runs.length > 1 ? dot(index) : null, ` ${name}`));
  const draw = () => {
    const listed = rows.filter((row) => row.differs || !byId("different").checked);
    byId("settings-table").replaceChildren(listed.length
      ? element("div", { class: "scroll" }, element("table", { class: "settings" },
        element("thead", {}, element("tr", {}, element("th", {}, "setting"), ...heads)),
        element("tbody", {}, ...listed.map((row) => element("tr", { class: row.differs ? "differs" : "" }, element("td", {}, row.name), ...row.values.map((value) => element("td", {}, value ?? "-")))))))
      : element("p", { class: "fine" }, "All settings are the same."));
  };
  byId("different").onchange = draw;
  draw();
}

headlineTable();
suites();
warnings();
chips();
charts();
answers();
settings();
byId("footer").textContent = `Written ${data.written} from ${data.runs.map((run) => run.folder).join(", ")}. Curves: Apache ECharts ${echarts.version}.`;
byId("smoothing").oninput = redraw;
byId("axis").onchange = redraw;
byId("unzoom").onclick = () => { for (const { chart } of shown.values()) chart?.dispatchAction({ type: "dataZoom", start: 0, end: 100 }); };
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", redraw);
new ResizeObserver(() => { for (const { chart } of shown.values()) chart?.resize(); }).observe(document.body);
redraw();
