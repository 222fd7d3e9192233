// SPDX-License-Identifier: Apache-2.0
"use strict";
// Hover over tokens works without plotly; plots are drawn when it is unpacked, and again when the colour scheme changes.
const data = JSON.parse(document.getElementById("data").textContent);
const METHODS = {
  full: {name: "full cache", symbol: "square", dash: "dot"},
  dms: {name: "DMS", symbol: "circle", dash: "solid"},
  keydiff: {name: "KeyDiff", symbol: "diamond", dash: "dash"},
  streaming: {name: "StreamingLLM", symbol: "cross", dash: "dashdot"},
};

function css(name) { return getComputedStyle(document.documentElement).getPropertyValue(name).trim(); }

// ---- tokens

const tokens = document.getElementById("tokens");
const spans = [...tokens.querySelectorAll(".t")];
const rows = data.retention.rows;
const layers = [...new Set(rows.map(row => row[0]))];
const heads = 1 + Math.max(...rows.map(row => row[1]));
// Layers stand in several blocks side by side where there are many.
const cells = rows.map(() => document.createElement("i"));
const grid = document.querySelector("#detail .grid");
let current = -1, pinned = false;

function buildGrid() {
  grid.style.gridTemplateColumns = `repeat(${layers.length > 40 && heads > 8 ? 24 : Math.max(heads, Math.min(18, 18 - 18 % heads))}, max-content)`;
  cells.forEach((cell, i) => { cell.title = `layer ${rows[i][0]}, head ${rows[i][1]}`; grid.append(cell); });
}

function heldBy(index) {
  const digits = data.retention.held[index];
  const missing = 4 * digits.length - rows.length;
  const bits = [...digits].map(x => parseInt(x, 16).toString(2).padStart(4, "0")).join("");
  return [...bits.slice(missing)].map(x => x === "1");
}

function show(index) {
  if (index < 0 || index >= spans.length || index === current) return;
  if (current >= 0) spans[current].classList.remove("on");
  current = index;
  spans[index].classList.add("on");
  const held = heldBy(index), count = data.retention.counts[index];
  cells.forEach((cell, i) => cell.classList.toggle("held", held[i]));
  const text = JSON.stringify(data.retention.tokens[index]);
  document.querySelector("#detail .what").textContent =
    `${text}, token ${index}: held by ${count} of ${rows.length} heads`;
  const where = layers.map(layer => {
    const found = rows.flatMap((row, i) => row[0] === layer && held[i] ? [row[1]] : []);
    return found.length ? `${layer}: ${found.join(" ")}` : "";
  }).filter(Boolean);
  document.querySelector("#detail .where").textContent =
    where.length ? `layer: heads  ${where.join("; ")}` : "No head holds it any more.";
}

function startTokens() {
  buildGrid();
  const indexOf = new Map(spans.map((span, i) => [span, i]));
  const at = event => indexOf.get(event.target.closest(".t")) ?? -1;
  tokens.addEventListener("mouseover", event => { if (!pinned) show(at(event)); });
  tokens.addEventListener("click", event => { const i = at(event); pinned = i >= 0 && !(pinned && i === current); show(i); });
  tokens.addEventListener("keydown", event => {
    const step = {ArrowRight: 1, ArrowLeft: -1}[event.key];
    if (!step) return;
    event.preventDefault();
    show(Math.min(spans.length - 1, Math.max(0, current + step)));
    spans[current].scrollIntoView({block: "nearest"});
  });
  document.getElementById("numbers").addEventListener("change", event => tokens.classList.toggle("counted", event.target.checked));
  const first = data.retention.spans.length ? data.retention.spans[0][0] : 0;
  show(first);
  const resident = data.retention.resident, total = data.retention.tokens.length;
  const most = resident.indexOf(Math.max(...resident)), least = resident.indexOf(Math.min(...resident));
  const say = i => `head ${rows[i][1]} of layer ${rows[i][0]} holds ${resident[i].toLocaleString("en")}`;
  const always = Math.min(total, data.model.window + 1 + data.model.protect_first), bare = resident.filter(x => x <= always).length;
  const none = bare ? ` ${bare} of ${rows.length} heads hold nothing but the ${always} tokens that every head keeps, the first and the newest.` : "";
  document.getElementById("extremes").textContent = `Here ${say(most)} of ${total.toLocaleString("en")} tokens, and ${say(least)}.${none}`;
}

// ---- plots

function layout(title, xTitle, yTitle, more = {}) {
  const axis = name => ({
    title: {text: name, font: {size: 12}}, gridcolor: css("--grid"), linecolor: css("--line"), zerolinecolor: css("--line"),
    tickfont: {size: 11}, automargin: true,
  });
  return {
    title: {text: title, font: {size: 14}, x: 0, xref: "paper", xanchor: "left"},
    paper_bgcolor: css("--ground"), plot_bgcolor: css("--ground"), font: {color: css("--ink"), family: "system-ui, sans-serif"},
    margin: {l: 52, r: 14, t: 42, b: 46}, legend: {orientation: "h", y: -0.24, font: {size: 11}}, hovermode: "closest",
    hoverlabel: {bgcolor: css("--panel"), bordercolor: css("--line"), font: {color: css("--ink")}}, dragmode: false,
    ...more, xaxis: {...axis(xTitle), ...more.xaxis}, yaxis: {...axis(yTitle), ...more.yaxis},
  };
}

const CONFIG = {responsive: true, displaylogo: false, displayModeBar: false};

function plot(id, traces, shape) {
  const place = typeof id === "string" ? document.getElementById(id) : id;
  if (place) Plotly.react(place, traces, shape, CONFIG);
}

function line(method, x, y, more = {}) {
  const look = METHODS[method] ?? {name: method, symbol: "x", dash: "longdash"};
  const color = css(`--m-${method}`) || css("--soft");
  return {
    x, y, name: look.name, mode: "lines+markers", marker: {symbol: look.symbol, size: 8, color}, line: {dash: look.dash, width: 2, color}, ...more,
  };
}

function group(points, key) {
  const found = new Map();
  points.forEach(x => found.set(x[key], [...(found.get(x[key]) ?? []), x]));
  return found;
}

const RATIO = {type: "log", tickvals: [1, 2, 3, 4, 6, 8, 12, 16, 24, 32], ticktext: ["1", "2", "3", "4", "6", "8", "12", "16", "24", "32"]};

// Decades and their thirds: a log axis of plotly's own labels says "2" and "5" without saying of what.
const DECADES = [-6, -5, -4, -3, -2, -1, 0, 1].flatMap(x => [10 ** x, 3 * 10 ** x]);
const LOG = {type: "log", tickvals: DECADES, ticktext: DECADES.map(x => String(Number(x.toPrecision(1))))};

function drawHeads() {
  const z = layers.map(() => Array(heads).fill(null));
  rows.forEach(([layer, head], i) => { z[layers.indexOf(layer)][head] = data.retention.resident[i]; });
  const dark = matchMedia("(prefers-color-scheme: dark)").matches;
  const scale = dark ? [[0, "#182430"], [.5, "#2f6aa5"], [1, "#9ccbff"]] : [[0, "#eef4fb"], [.5, "#6fa6dd"], [1, "#1f5f9f"]];
  const wide = layers.length > heads; // layers go to the right: pages are wider than high, phones are not
  const turned = wide && document.getElementById("plot-heads").clientWidth > 700;
  const values = turned ? z[0].map((_, head) => z.map(row => row[head])) : z;
  const x = turned ? layers : [...Array(heads).keys()], y = turned ? [...Array(heads).keys()] : layers;
  const trace = {
    type: "heatmap", z: values, x: x.map(String), y: y.map(String), colorscale: scale, xgap: 2, ygap: 2, texttemplate: heads <= 16 ? "%{z}" : "",
    textfont: {size: turned ? 10 : 11}, colorbar: {title: {text: "tokens", font: {size: 11}}, thickness: 10, outlinewidth: 0},
    hovertemplate: `${turned ? "layer %{x}, head %{y}" : "layer %{y}, head %{x}"}: %{z} of ${data.retention.tokens.length} tokens<extra></extra>`,
  };
  const height = Math.max(260, 90 + (turned ? 46 : 21) * y.length);
  const names = turned ? ["layer", "KV head"] : ["KV head", "layer"];
  document.getElementById("plot-heads").style.minHeight = `${height}px`;
  plot("plot-heads", [trace], layout("", ...names, {
    height, margin: {l: 46, r: 10, t: 10, b: 44}, xaxis: {type: "category", showgrid: false}, yaxis: {type: "category", showgrid: false, autorange: "reversed"},
  }));
}

// One bar a token; bands and the window's edge say what the text's boxes and its end are.
function drawAlong() {
  const {counts, spans, window: delay, tokens: words} = data.retention, heads = rows.length;
  const x = counts.map((_, i) => i);
  const trace = {
    type: "bar", x, y: counts, marker: {color: css("--m-dms"), line: {width: 0}}, text: words.map(word => JSON.stringify(word)),
    hovertemplate: `token %{x}, %{text}: %{y} of ${heads} heads<extra></extra>`, textposition: "none",
  };
  const box = css("--box"), edge = counts.length - delay - 1.5;
  const bands = spans.map(([start, stop]) => ({
    type: "rect", x0: start - .5, x1: stop - .5, yref: "paper", y0: 0, y1: 1, line: {color: box, width: 1, dash: "dot"}, fillcolor: box, opacity: .22, layer: "below",
  }));
  const line = {type: "line", x0: edge, x1: edge, yref: "paper", y0: 0, y1: 1, line: {color: css("--soft"), width: 1, dash: "dash"}};
  plot("plot-along", [trace], layout("", "token", `of ${heads} heads`, {
    height: 208, bargap: 0, margin: {l: 46, r: 10, t: 8, b: 40}, shapes: edge > 0 ? [...bands, line] : bands,
    xaxis: {range: [-.5, counts.length - .5]}, yaxis: {range: [0, heads], tickvals: [0, Math.round(heads / 2), heads]},
  }));
}

function drawAccuracy() {
  [...group(data.accuracy, "task")].forEach(([task, points], i) => {
    const full = points.find(x => x.method === "full");
    // DMS last: it lies on top where lines meet.
    const others = points.filter(x => x.method !== "full").sort((a, b) => (a.method === "dms") - (b.method === "dms"));
    const traces = [...group(others, "method")].map(([method, own]) => line(
      method, own.map(x => x.ratio), own.map(x => 100 * x.right / x.count),
      {text: own.map(x => `${x.right} of ${x.count}`), hovertemplate: "%{fullData.name}, CR %{x:.2f}: %{text}<extra></extra>"}));
    if (full) {
      const ends = [1, Math.max(2, ...points.map(x => x.ratio))];
      traces.unshift(line("full", ends, ends.map(() => 100 * full.right / full.count),
        {mode: "lines", text: ends.map(() => `${full.right} of ${full.count}`), hovertemplate: "full cache: %{text}<extra></extra>"}));
    }
    plot(`plot-task-${i}`, traces, layout(`${task}: right answers, of ${points[0].count}`, "compression ratio reached", "%", {xaxis: RATIO, yaxis: {range: [-5, 107]}}));
  });
}

function drawKl() {
  const place = document.getElementById("plot-kl");
  if (!place) return;
  [...group(data.kl, "task")].forEach(([task, points], i) => {
    const id = `plot-kl-${i}`;
    if (!document.getElementById(id)) place.append(Object.assign(document.createElement("div"), {id, className: "plot"}));
    const ordered = [...points].sort((a, b) => (a.method === "dms") - (b.method === "dms"));
    const traces = [...group(ordered, "method")].map(([method, own]) => line(
      method, own.map(x => x.ratio), own.map(x => Math.max(x.kl, 1e-6)), {hovertemplate: "%{fullData.name}, CR %{x:.2f}: %{y:.4f} nats<extra></extra>"}));
    plot(id, traces, layout(`${task}: KL from the full cache`, "compression ratio reached", "nats per token",
      {xaxis: RATIO, yaxis: LOG}));
  });
}

function drawCurve() {
  if (!data.curve) return;
  const points = data.curve.points.filter(x => x.compression_ratio > 1.01);
  const trace = line("dms", points.map(x => x.compression_ratio), points.map(x => Math.max(x.kl, 1e-6)), {
    name: "held-out samples", hovertemplate: "CR %{x:.2f}: %{y:.4f} nats<extra></extra>",
    error_x: {type: "data", symmetric: false, array: points.map(x => x.highest_cr - x.compression_ratio),
      arrayminus: points.map(x => x.compression_ratio - x.lowest_cr), thickness: 1, color: css("--m-dms")},
  });
  plot("plot-curve", [trace], layout("The model's curve", "compression ratio", "KL, nats per token",
    {xaxis: RATIO, yaxis: LOG, showlegend: false}));
}

function drawGrowth() {
  if (!data.growth) return;
  const both = (pick, more = {}) => ["full", "dms"].map(method => line(method, data.growth[method].seen, pick(data.growth[method]), {mode: "lines", ...more}));
  const end = data.growth.read;
  const mark = {shapes: [{type: "line", x0: end, x1: end, yref: "paper", y0: 0, y1: 1, line: {color: css("--soft"), width: 1, dash: "dot"}}],
    annotations: [{x: end, y: 1, yref: "paper", text: "writes", showarrow: false, xanchor: "right", xshift: -4, font: {size: 11, color: css("--soft")}}]};
  plot("plot-resident", both(x => x.resident, {hovertemplate: "%{fullData.name}: %{y:,.0f} of %{x:,} tokens<extra></extra>"}),
    layout("Tokens held by a head, mean", "tokens seen", "tokens", {...mark, yaxis: {rangemode: "tozero"}}));
  plot("plot-bytes", both(x => x.kv_bytes.map(y => y / 1e6), {hovertemplate: "%{fullData.name}: %{y:.2f} MB at %{x:,} tokens<extra></extra>"}),
    layout("KV cache allocated", "tokens seen", "MB", {...mark, yaxis: {rangemode: "tozero"}}));
  const times = ["full", "dms"].map(method => {
    const own = data.growth[method], at = own.seen.map((_, i) => i).filter(i => own.milliseconds[i] !== null);
    return line(method, at.map(i => own.seen[i]), at.map(i => own.milliseconds[i]),
      {mode: "markers", marker: {symbol: METHODS[method].symbol, size: 5, color: css(`--m-${method}`)}, hovertemplate: "%{fullData.name}: %{y:.1f} ms<extra></extra>"});
  });
  // Single slow tokens, when the machine did something else, would flatten all others.
  const most = 3 * Math.max(data.growth.full.milliseconds_a_token, data.growth.dms.milliseconds_a_token);
  plot("plot-time", times, layout("Time of a new token", "tokens seen", "ms", {yaxis: {range: [0, most]}}));
}

function drawCapacity() {
  if (!data.capacity) return;
  const {contexts, rows: variants} = data.capacity, top = Math.max(...variants.flatMap(x => x.sequences)), looks = ["full", "dms", "streaming"];
  const traces = variants.map((row, i) => line(looks[i], contexts, row.sequences, {
    name: row.variant, mode: "lines+markers+text", text: row.sequences.map(x => x.toLocaleString("en")), cliponaxis: false,
    textposition: i ? "top right" : "bottom left", textfont: {size: 11, color: css("--ink")},
    hovertemplate: "%{fullData.name}, %{x:,} tokens: %{y:,} at once<extra></extra>",
  }));
  const ends = [Math.log10(contexts[0] / 1.5), Math.log10(contexts[contexts.length - 1] * 1.6)];
  const low = Math.min(...variants.flatMap(x => x.sequences).filter(x => x > 0));
  plot("plot-capacity", traces, layout("Conversations at once", "tokens of each", "", {
    xaxis: {type: "log", tickvals: contexts, ticktext: contexts.map(x => x.toLocaleString("en")), range: ends},
    yaxis: {type: "log", dtick: 1, tickformat: ",", range: [Math.log10(low / 2.5), Math.log10(top * 2.5)]},
  }));
}

function draw() { drawAlong(); drawHeads(); drawAccuracy(); drawKl(); drawCurve(); drawGrowth(); drawCapacity(); }

async function unpack() {
  const packed = Uint8Array.from(atob(document.getElementById("plotly").textContent.trim()), x => x.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.head.append(script);
}

startTokens();
unpack().then(() => {
  draw();
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  matchMedia("(max-width: 46rem)").addEventListener("change", draw);
  document.documentElement.dataset.drawn = "yes";
}).catch(error => {
  document.querySelectorAll(".plot").forEach(x => { x.className = "plot failed"; x.textContent = `This browser cannot draw the plots (${error}).`; });
  document.documentElement.dataset.drawn = "no";
});
