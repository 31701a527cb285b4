// The form of the served model, made from its signature: inputs, options, and the answer.
import { drawAnswer } from "/page/answer.js";
import { startRecording } from "/page/recording.js";

const $ = (id) => document.getElementById(id);
export const make = (tag, attributes = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined) continue;
    if (typeof value === "string") node.setAttribute(name, value);
    else node[name] = value;
  }
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
};
const state = { models: [], model: null, files: {}, history: [] };

function headers(more = {}) {
  const key = sessionStorage.getItem("key");
  return key ? { ...more, Authorization: `Bearer ${key}` } : more;
}

export async function call(path, options = {}) {
  const response = await fetch(path, { ...options, headers: headers(options.headers) });
  if (response.status === 401) {
    $("key").hidden = false;
    throw new Error("This server needs an API key.");
  }
  if (!response.ok) {
    let text = `${response.status} ${response.statusText}`;
    try { text = (await response.json()).error.message; } catch { /* the status says enough */ }
    throw new Error(text);
  }
  return response;
}

function showError(error) {
  $("answer").replaceChildren(make("p", { class: "error", role: "alert" }, error.message));
}

async function start() {
  try {
    state.models = (await (await call("/v1/models")).json()).data;
  } catch (error) { showError(error); return; }
  $("key").hidden = true;
  $("answer").replaceChildren();
  const choice = $("models");
  choice.replaceChildren(...state.models.map((model) => make("option", { value: model.id }, model.id)));
  choice.hidden = state.models.length < 2;
  const wanted = new URLSearchParams(location.search).get("model");
  if (state.models.some((model) => model.id === wanted)) choice.value = wanted;
  choice.onchange = () => open(choice.value);
  await open(choice.value);
}

async function open(name) {
  const model = await (await call(`/v1/models/${encodeURIComponent(name)}`)).json();
  Object.assign(state, { model, files: {}, history: [] });
  document.title = $("title").textContent = name;
  $("about").textContent = `${model.signature.task || "network"}: ${model.architecture}, ${model.parameters.toLocaleString("en")} parameters`;
  $("schema").href = `/openapi.json?model=${encodeURIComponent(name)}`;
  $("answer").replaceChildren(...model.notes.map((note) => make("p", { class: "note" }, note)));
  const chats = isConversation(model.signature);
  $("chat").hidden = !chats;
  $("row").hidden = chats;
  $("turns").replaceChildren();
  if (!chats) buildForm(model.signature);
  $("call").textContent = describeCall(model);
}

const inputsOf = (signature) => (signature.inputs || []).filter((input) => input.name !== "*");
const isConversation = (signature) => inputsOf(signature).some((input) => input.kind === "messages");
const isTable = (signature) => ["step", "user"].includes(signature.record_for || "row") || (signature.inputs || []).some((i) => i.name === "*");

function describeCall(model) {
  const rows = JSON.stringify([exampleRow(model.signature)]);
  const body = `{"model": ${JSON.stringify(model.id)}, "rows": ${rows}}`;
  return `curl ${location.origin}/v1/predict \\\n  -H 'Content-Type: application/json' \\\n  -d '${body}'`;
}

function exampleRow(signature) {
  const row = {};
  for (const input of inputsOf(signature)) {
    const example = (input.values || [])[0];
    if (["image", "audio", "video", "mask"].includes(input.kind)) row[input.name] = `data:${(input.media_types || [])[0]};base64,...`;
    else if (input.kind === "number") row[input.name] = typeof input.low === "number" ? input.low : 1;
    else if (input.kind === "list") row[input.name] = ["one", "two"];
    else if (input.kind === "messages") row[input.name] = [{ role: "user", content: "Hello" }];
    else row[input.name] = example ?? (typeof input.low === "string" ? input.low : "text");
  }
  return signature.row_form === "value" ? Object.values(row)[0] : row;
}

function buildForm(signature) {
  const fields = isTable(signature) ? [buildTableField(signature)] : inputsOf(signature).map(buildField);
  const options = (signature.options || []).filter((option) => option.name !== "chat");
  const required = options.filter((option) => option.required).map(buildOption);
  const rest = options.filter((option) => !option.required);
  const more = rest.length ? make("details", {}, make("summary", {}, "Options"), make("div", { class: "options" }, ...rest.map(buildOption))) : null;
  $("row").replaceChildren(...fields, ...required, ...(more ? [more] : []), make("button", { type: "submit" }, "Predict"));
}

function buildField(input) {
  const id = `input-${input.name}`;
  const range = input.low !== undefined && input.low !== null ? `${input.low} to ${input.high}` : "";
  const title = make("label", { for: id }, input.name, " ", make("small", {}, [input.about, range].filter(Boolean).join(", ")));
  if (["image", "audio", "video", "mask"].includes(input.kind)) return buildFileField(input, id, title);
  const common = { id, name: input.name, "data-kind": input.kind };
  const values = input.values || [];
  if (input.kind === "boolean" || (values.length && values.length <= 200)) {
    const shown = input.kind === "boolean" && !values.length ? ["false", "true"] : values;
    const empty = input.nullable || input.required === false ? [make("option", { value: "" }, "")] : [];
    return make("div", {}, title, make("select", common, ...empty, ...shown.map((value) => make("option", { value }, value))));
  }
  if (input.kind === "text" || input.kind === "list") {
    return make("div", { class: "wide" }, title, make("textarea", { ...common, rows: "4", placeholder: input.kind === "list" ? "words, separated by spaces" : "" }));
  }
  const list = values.length ? make("datalist", { id: `${id}-values` }, ...values.map((value) => make("option", { value }))) : null;
  const extra = input.kind === "number" ? { type: "number", step: "any", inputmode: "decimal" } : { type: "text" };
  const placeholder = range || (values.length ? values[0] : "");
  return make("div", {}, title, make("input", { ...common, ...extra, placeholder, list: list ? list.id : null }), list);
}

function buildFileField(input, id, title) {
  const preview = make("div");
  const picker = make("input", { id, type: "file", accept: (input.media_types || []).join(",") });
  const box = make("div", { class: "drop" }, make("p", { class: "hint" }, `Drop ${input.kind === "image" ? "a photo" : "a file"} here, or choose one:`), picker, preview);
  const use = (file) => {
    if (!file) return;
    state.files[input.name] = file;
    const url = URL.createObjectURL(file);
    preview.replaceChildren(
      input.kind === "audio" ? make("audio", { src: url, controls: true })
        : input.kind === "video" && file.type.startsWith("video") ? make("video", { src: url, controls: true })
        : make("img", { src: url, alt: file.name }));
  };
  picker.onchange = () => use(picker.files[0]);
  box.ondragover = (event) => { event.preventDefault(); box.classList.add("over"); };
  box.ondragleave = () => box.classList.remove("over");
  box.ondrop = (event) => { event.preventDefault(); box.classList.remove("over"); use(event.dataTransfer.files[0]); };
  if (input.kind === "audio") box.insertBefore(buildRecorder(use), preview);
  return make("div", { class: "wide" }, title, box);
}

function buildRecorder(use) {
  const button = make("button", { type: "button", class: "plain" }, "Record");
  let stop = null;
  button.onclick = async () => {
    if (stop) { use(await stop()); stop = null; button.textContent = "Record again"; return; }
    try { stop = await startRecording(); button.textContent = "Stop"; } catch (error) { showError(error); }
  };
  return button;
}

function buildTableField(signature) {
  const names = inputsOf(signature).map((input) => input.name);
  const text = make("textarea", { id: "table", rows: "10", placeholder: `${names.join(",")}\n...`, spellcheck: "false" });
  const picker = make("input", { type: "file", accept: ".csv,text/csv" });
  picker.onchange = async () => { text.value = await picker.files[0].text(); };
  return make("div", { class: "wide" }, make("label", { for: "table" }, "Table ", make("small", {}, "CSV with a header")), picker, text);
}

function buildOption(option) {
  const id = `option-${option.name}`;
  const common = { id, name: option.name, "data-type": option.type, title: option.about || "", required: Boolean(option.required) };
  const standard = option.default === undefined || option.default === null ? "" : String(option.default);
  let field;
  if (option.choices && option.choices.length) {
    field = make("select", common, make("option", { value: "" }, standard || "default"), ...option.choices.map((c) => make("option", { value: String(c) }, String(c))));
  } else if (option.type === "boolean") {
    field = make("select", common, make("option", { value: "" }, standard || "default"), make("option", { value: "true" }, "true"), make("option", { value: "false" }, "false"));
  } else {
    const number = option.type === "integer" || option.type === "number";
    field = make("input", { ...common, type: number ? "number" : "text", step: option.type === "integer" ? "1" : "any", placeholder: standard });
  }
  return make("div", { class: option.required ? "wide" : "" }, make("label", { for: id }, option.name, " ", make("small", {}, option.about || "")), field);
}

function readOptions() {
  const options = {};
  for (const field of $("row").querySelectorAll("[data-type]")) {
    if (field.value === "") continue;
    const type = field.dataset.type;
    options[field.name] = type === "integer" || type === "number" ? Number(field.value) : type === "boolean" ? field.value === "true" : field.value;
  }
  return options;
}

const toDataUrl = (file) => new Promise((resolve, reject) => {
  const reader = new FileReader();
  reader.onload = () => resolve(reader.result);
  reader.onerror = () => reject(new Error(`${file.name} cannot be read.`));
  reader.readAsDataURL(file);
});

async function readRow(signature) {
  const row = {};
  for (const input of inputsOf(signature)) {
    const file = state.files[input.name];
    if (["image", "audio", "video", "mask"].includes(input.kind)) {
      if (!file) throw new Error(`Choose a file for ${input.name}.`);
      row[input.name] = await toDataUrl(file);
      continue;
    }
    const text = $("row").querySelector(`[name=${CSS.escape(input.name)}]`).value;
    if (text === "" && (input.nullable || input.required === false)) {
      if (input.required !== false) row[input.name] = null;
    } else if (input.kind === "number") row[input.name] = text === "" ? null : Number(text);
    else if (input.kind === "list") row[input.name] = text.split(/\s+/).filter(Boolean);
    else row[input.name] = text;
  }
  return row;
}

$("row").onsubmit = async (event) => {
  event.preventDefault();
  const { signature, id } = state.model;
  const button = $("row").querySelector("button[type=submit]");
  button.disabled = true;
  $("answer").replaceChildren(make("p", { class: "hint" }, "Computing ..."));
  try {
    let response, table = "";
    if (isTable(signature)) {
      table = $("table").value;
      const query = new URLSearchParams({ model: id, options: JSON.stringify(readOptions()) });
      response = await call(`/v1/predict?${query}`, { method: "POST", headers: { "Content-Type": "text/csv" }, body: table });
    } else {
      const row = await readRow(signature);
      const rows = signature.row_form === "value" ? Object.values(row) : [row];
      const body = JSON.stringify({ model: id, rows, options: readOptions() });
      response = await call("/v1/predict", { method: "POST", headers: { "Content-Type": "application/json" }, body });
    }
    const image = Object.values(state.files).find((file) => file.type.startsWith("image"));
    await drawAnswer($("answer"), await response.json(), signature, { image, table });
  } catch (error) { showError(error); } finally { button.disabled = false; }
};

function addTurn(role, text) {
  const turn = make("li", { class: role }, text);
  $("turns").append(turn);
  turn.scrollIntoView({ block: "nearest" });
  return turn;
}

const MAX_ANSWER_TOKENS = 1024;
let stopping = null; // while an answer is written

$("say").onsubmit = async (event) => {
  event.preventDefault();
  if (stopping) { stopping.abort(); return; }
  const text = $("words").value.trim();
  if (!text) return;
  $("words").value = "";
  stopping = new AbortController();
  $("send").textContent = "Stop";
  $("words").required = false;
  $("answer").replaceChildren();
  state.history.push({ role: "user", content: text });
  addTurn("user", text);
  const turn = addTurn("assistant", "");
  try {
    const body = JSON.stringify({ model: state.model.id, messages: state.history, stream: true, max_tokens: MAX_ANSWER_TOKENS });
    const response = await call("/v1/chat/completions", { method: "POST", headers: { "Content-Type": "application/json" }, body, signal: stopping.signal });
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    let rest = "";
    for (;;) {
      const { done, value } = await reader.read();
      if (done) break;
      const events = (rest + value).split("\n\n");
      rest = events.pop();
      for (const line of events) {
        const data = line.replace(/^data: /, "");
        if (data === "[DONE]") continue;
        const chunk = JSON.parse(data);
        if (chunk.error) throw new Error(chunk.error.message);
        turn.textContent += chunk.choices[0]?.delta?.content || "";
      }
    }
    state.history.push({ role: "assistant", content: turn.textContent });
  } catch (error) {
    if (error.name === "AbortError" && turn.textContent) state.history.push({ role: "assistant", content: turn.textContent });
    else { turn.remove(); state.history.pop(); if (error.name !== "AbortError") showError(error); }
  } finally { stopping = null; $("send").textContent = "Send"; $("words").required = true; $("words").focus(); }
};
$("words").onkeydown = (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); $("say").requestSubmit(); }
};
$("key").onsubmit = (event) => {
  event.preventDefault();
  sessionStorage.setItem("key", $("key-value").value);
  start();
};
start();
