// Draws the records of a prediction: probabilities, boxes, masks, key points, forecasts, files, texts, and anything else as a table.
import { make } from "/page/form.js";

const COLORS = ["#1a5fb4", "#c01c28", "#26a269", "#b5651d", "#813d9c", "#008b8b", "#a0522d", "#5e5c64"];
const MAX_BARS = 12, MAX_SHOWN = 50, MIN_SIDE = 480;
const round = (value) => (Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(6))));
const percent = (value) => `${(100 * value).toFixed(1)} %`;

export async function drawAnswer(place, answer, signature, given) {
  const parts = answer.notes.map((note) => make("p", { class: "note" }, note));
  const records = answer.predictions;
  if ((signature.record_for || "row") === "step" && records.length && "value" in records[0]) parts.push(...drawForecasts(records, signature, given.table));
  else for (const record of records.slice(0, MAX_SHOWN)) parts.push(await drawRecord(record, given, records.length > 1));
  parts.push(make("details", {}, make("summary", {}, "Records as JSON"), make("pre", {}, JSON.stringify(records, shorten, 1))));
  place.replaceChildren(make("h2", {}, "Prediction"), ...parts);
}

const shorten = (name, value) => (typeof value === "string" && value.startsWith("data:") && value.length > 200 ? `${value.slice(0, 60)}...` : value);

async function drawRecord(record, given, several) {
  if (record.error) return make("p", { class: "error" }, record.error);
  const box = make("div", { class: record.input === "made" ? "made" : "record" });
  const done = new Set(["input"]);
  const take = (name) => { done.add(name); return record[name]; };
  if (several && record.input !== "made") box.append(make("h2", {}, String(record.user ?? take("input"))));
  if ("user" in record) done.add("user");
  if ("label" in record) box.append(make("p", { class: "big" }, take("label")));
  if ("answer" in record) box.append(make("p", { class: "big" }, take("answer") ?? "no answer"));
  if (record.probabilities) { box.append(drawBars(take("probabilities"))); done.add("probability"); }
  if (Array.isArray(record.objects) && given.image) {
    box.append(await drawObjects(take("objects"), given.image));
    done.add("picture");
    if (record.found) box.append(make("p", {}, take("found") || "nothing found"));
  }
  if (Array.isArray(record.entities) && Array.isArray(record.tokens)) { box.append(drawEntities(take("tokens"), take("entities"))); done.add("tags"); }
  if (Array.isArray(record.items) && Array.isArray(record.scores)) {
    box.append(drawTable(["item", "score"], take("items").map((item, i) => [item, round(record.scores[i])])));
    done.add("scores"); done.add("recommended");
  }
  if (typeof record.text === "string") box.append(make("p", { class: "big" }, take("text")));
  for (const [name, value] of Object.entries(record)) {
    if (done.has(name)) continue;
    if (typeof value === "string" && value.startsWith("data:")) {
      done.add(name);
      const kind = value.slice(5, value.indexOf("/"));
      const tag = kind === "image" ? "img" : kind === "video" ? "video" : "audio";
      const small = record.class !== undefined || record.caption !== undefined;
      if (small) { done.add("class"); done.add("caption"); }
      const file = make(tag, { src: value, alt: name, controls: tag !== "img" || null });
      box.append(make("figure", {}, file, make("figcaption", { class: "hint" }, String(record.caption ?? record.class ?? name))));
    }
  }
  const rest = Object.entries(record).filter(([name]) => !done.has(name));
  if (rest.length === 1 && typeof rest[0][1] === "number") box.append(make("p", { class: "big" }, `${rest[0][0]} ${round(rest[0][1])}`));
  else if (rest.length) box.append(drawTable(["", ""], rest.map(([name, value]) => [name, toText(value)])));
  return box;
}

const toText = (value) => (typeof value === "number" ? round(value) : typeof value === "string" ? value : JSON.stringify(value));

function drawBars(probabilities) {
  const sorted = Object.entries(probabilities).sort((a, b) => b[1] - a[1]);
  const bars = sorted.slice(0, MAX_BARS).flatMap(([name, value]) => [make("span", {}, name), make("meter", { value, min: 0, max: 1 }), make("span", {}, percent(value))]);
  return make("div", { class: "bars" }, ...bars);
}

function drawTable(head, rows) {
  const header = head.some(Boolean) ? [make("tr", {}, ...head.map((name) => make("th", {}, name)))] : [];
  return make("div", { class: "scroll" }, make("table", {}, ...header, ...rows.map((row) => make("tr", {}, ...row.map((cell) => make("td", {}, String(cell)))))));
}

function drawEntities(tokens, entities) {
  const line = make("p", { class: "big" });
  const inside = (i) => entities.find((entity) => entity.first <= i && i <= entity.last);
  for (let i = 0; i < tokens.length; i++) {
    const entity = inside(i);
    if (!entity) { line.append(`${tokens[i]} `); continue; }
    line.append(make("mark", { title: percent(entity.probability ?? 1) }, `${entity.text} (${entity.type})`), " ");
    i = entity.last;
  }
  return line;
}

async function drawObjects(objects, file) {
  const image = await createImageBitmap(file);
  const scale = Math.max(1, MIN_SIDE / Math.max(image.width, image.height)); // boxes on a small image need room
  const canvas = make("canvas", { width: Math.round(scale * image.width), height: Math.round(scale * image.height) });
  const pen = canvas.getContext("2d");
  pen.scale(scale, scale);
  pen.drawImage(image, 0, 0);
  const size = Math.max(canvas.width, canvas.height), labels = [...new Set(objects.map((object) => object.label))];
  for (const object of objects.slice().reverse()) {
    const color = COLORS[labels.indexOf(object.label) % COLORS.length];
    if (object.mask) drawMask(pen, object.mask, color);
    const [left, top, right, bottom] = object.box;
    pen.strokeStyle = pen.fillStyle = color;
    pen.lineWidth = Math.max(1, size / 300) / scale;
    pen.strokeRect(left, top, right - left, bottom - top);
    pen.font = `${Math.max(12, size / 40) / scale}px system-ui`;
    const text = `${object.label} ${percent(object.score)}`, height = Math.max(15, size / 32) / scale;
    const y = Math.max(height, top);
    pen.fillRect(left, y - height, pen.measureText(text).width + 4, height);
    pen.fillStyle = "white";
    pen.fillText(text, left + 2, y - height / 4);
    pen.fillStyle = color;
    for (const point of object.keypoints || []) {
      if (point.x === null || (point.score ?? 1) < 0.3) continue;
      pen.beginPath();
      pen.arc(point.x, point.y, Math.max(3, size / 120) / scale, 0, 7);
      pen.fill();
    }
  }
  return canvas;
}

// A mask in COCO's compressed run lengths, column by column: 6 bits for each character, the difference to the run before the last.
export function decodeRuns(counts) {
  const runs = [];
  for (let i = 0; i < counts.length;) {
    let value = 0, shift = 0, more = true;
    while (more) {
      const code = counts.charCodeAt(i++) - 48;
      value |= (code & 31) << shift;
      shift += 5;
      more = (code & 32) !== 0;
      if (!more && code & 16) value |= -1 << shift;
    }
    runs.push(runs.length > 2 ? value + runs[runs.length - 2] : value);
  }
  return runs;
}

function drawMask(pen, mask, color) {
  const [height, width] = mask.size;
  const pixels = new ImageData(width, height), [r, g, b] = [1, 3, 5].map((at) => parseInt(color.slice(at, at + 2), 16));
  let at = 0, inside = false;
  for (const run of decodeRuns(mask.counts)) {
    if (inside) for (let i = at; i < at + run; i++) pixels.data.set([r, g, b, 110], 4 * ((i % height) * width + Math.floor(i / height)));
    at += run;
    inside = !inside;
  }
  const layer = new OffscreenCanvas(width, height);
  layer.getContext("2d").putImageData(pixels, 0, 0);
  pen.drawImage(layer, 0, 0);
}

function splitCsv(text) {
  return text.trim().split(/\r?\n/).map((line) => [...line.matchAll(/("(?:[^"]|"")*"|[^,]*)(?:,|$)/g)].slice(0, -1).map((found) => found[1].replace(/^"|"$/g, "").replaceAll('""', '"')));
}

function readHistory(table, signature, series) {
  const [head, ...rows] = splitCsv(table || "");
  const find = (role) => (signature.inputs || []).find((input) => input.role === role)?.name;
  const at = (name) => (head || []).indexOf(name);
  const [value, group] = [at(find("target")), at(find("series"))];
  if (value < 0) return [];
  const mine = rows.filter((row) => group < 0 || row[group] === series);
  return mine.map((row) => (row[value] === "" || row[value] === undefined ? NaN : Number(row[value]))).filter(Number.isFinite);
}

function drawForecasts(records, signature, table) {
  const groups = new Map();
  for (const record of records) groups.set(record.series ?? "", [...(groups.get(record.series ?? "") || []), record]);
  return [...groups].slice(0, 12).map(([name, steps]) => {
    const history = readHistory(table, signature, name).slice(-3 * steps.length);
    return make("figure", {}, drawChart(history, steps), make("figcaption", { class: "hint" }, `${name} ${steps[0].time} to ${steps.at(-1).time}`));
  });
}

function drawChart(history, steps) {
  const width = 640, height = 240, pad = 46, count = history.length + steps.length;
  const all = [...history, ...steps.flatMap((step) => [step.value, step.low ?? step.value, step.high ?? step.value])];
  const low = Math.min(...all), high = Math.max(...all), span = high - low || 1;
  const x = (i) => pad + ((width - pad - 6) * i) / Math.max(count - 1, 1), y = (v) => height - 18 - ((height - 26) * (v - low)) / span;
  const path = (points) => points.map(([i, v], k) => `${k ? "L" : "M"}${x(i).toFixed(1)} ${y(v).toFixed(1)}`).join("");
  const svg = (tag, attributes, text = "") => {
    const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
    for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
    node.textContent = text;
    return node;
  };
  const ahead = steps.map((step, i) => [history.length + i, step]);
  const chart = svg("svg", { viewBox: `0 0 ${width} ${height}`, role: "img", "aria-label": "forecast" });
  if ("low" in steps[0]) {
    const band = [...ahead.map(([i, s]) => [i, s.high]), ...ahead.map(([i, s]) => [i, s.low]).reverse()];
    chart.append(svg("path", { d: `${path(band)}Z`, fill: COLORS[0], "fill-opacity": "0.2" }));
  }
  chart.append(svg("path", { d: path(history.map((v, i) => [i, v])), class: "series", stroke: "currentColor" }));
  const joined = history.length ? [[history.length - 1, history.at(-1)]] : [];
  chart.append(svg("path", { d: path([...joined, ...ahead.map(([i, s]) => [i, s.value])]), class: "series", stroke: COLORS[0] }));
  for (const value of [low, high]) chart.append(svg("text", { x: 0, y: y(value) + 4, "font-size": 16, fill: "currentColor" }, round(Number(value.toPrecision(3)))));
  return chart;
}
