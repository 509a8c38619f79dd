// The page: load, run every sentence, compare with the golden, show.

import { Encoder } from "./encoder.js";
import { linearPipelines, openGpu } from "./q4gsw.js";

// float32 through six layers of states of order 1; a wrong nibble shows as 1e-2 and more.
const TOLERANCE = 5e-5;
const REPEATS = 7;
const SLOW = 1000; // ms: a software adapter; its first run is its time
const DECODE_MAX_ROWS = 8;
const element = (id) => document.getElementById(id);

function setState(state, message) {
  document.body.dataset.state = state;
  element("status").textContent = message;
}

async function load() {
  const files = ["manifest.json", "model.bin"].map(async (url) => {
    const response = await fetch(url);
    if (!response.ok) throw new Error(`${url}: ${response.status}. Run export.py first.`);
    return url.endsWith(".json") ? response.json() : response.arrayBuffer();
  });
  const [manifest, data] = await Promise.all(files);
  const { device, name } = await openGpu();
  device.addEventListener("uncapturederror", ({ error }) => setState("failed", error.message));
  const linear = await linearPipelines(device, "wgsl", manifest.group_size);
  const encoder = await Encoder.create(device, linear, manifest, data);
  return { manifest, data, name, encoder };
}

/** Largest |got - golden| of each layer; NaN counts as infinite. */
function layerErrors(got, golden, layers) {
  const size = golden.length / layers;
  return Array.from({ length: layers }, (_, layer) => {
    let worst = 0;
    for (let i = layer * size; i < (layer + 1) * size; i++) {
      const error = Math.abs(got[i] - golden[i]);
      if (!(error <= worst)) worst = Number.isNaN(error) ? Infinity : error;
    }
    return worst;
  });
}

/** Mean over tokens of the last layer, as a unit vector. */
function embedding(states, tokens, hidden) {
  const last = states.subarray(states.length - tokens * hidden);
  const mean = new Float64Array(hidden);
  last.forEach((value, i) => (mean[i % hidden] += value));
  const norm = Math.hypot(...mean);
  return mean.map((value) => value / norm);
}

async function runAll({ manifest, data, encoder }) {
  const results = [];
  for (const { text, tokens, input, golden } of manifest.sentences) {
    const floats = ([start, bytes]) => new Float32Array(data, start, bytes / 4);
    const start = performance.now();
    const states = await encoder.run(floats(input), tokens);
    const once = performance.now() - start;
    results.push({
      text,
      tokens,
      errors: layerErrors(states, floats(golden), manifest.layers.length),
      milliseconds: once > SLOW ? once : await encoder.time(tokens, REPEATS),
      embedding: embedding(states, tokens, manifest.hidden),
    });
    element("status").textContent = `Running: ${results.length} of ${manifest.sentences.length}`;
  }
  return results;
}

const scientific = (value) => value.toExponential(1);
const megabytes = (value) => `${(value / 1e6).toFixed(1)}\u00a0MB`;

function showSentences(results) {
  const list = element("sentences");
  const choose = (chosen) => {
    [...list.querySelectorAll("button")].forEach((button, i) => {
      const a = results[chosen].embedding;
      const similarity = a.reduce((sum, value, k) => sum + value * results[i].embedding[k], 0);
      button.setAttribute("aria-pressed", i === chosen);
      button.style.setProperty("--similarity", similarity);
      button.querySelector(".number").textContent = similarity.toFixed(2);
    });
  };
  list.replaceChildren(
    ...results.map(({ text }, i) => {
      const button = document.createElement("button");
      const [label, number] = [document.createElement("span"), document.createElement("span")];
      label.textContent = text;
      number.className = "number";
      button.append(label, number);
      button.addEventListener("click", () => choose(i));
      const item = document.createElement("li");
      item.append(button);
      return item;
    }),
  );
  choose(1);
}

function showLayers(worst) {
  const [low, high] = [-9, -3]; // powers of ten
  element("layers").replaceChildren(
    ...worst.flatMap((error, i) => {
      const [label, bar, number] = ["span", "div", "span"].map((tag) => document.createElement(tag));
      label.textContent = `layer ${i + 1}`;
      bar.className = "bar";
      const share = (Math.log10(Math.max(error, 10 ** low)) - low) / (high - low);
      bar.style.width = `${100 * Math.min(1, share)}%`;
      number.className = "number";
      number.textContent = scientific(error);
      return [label, bar, number];
    }),
  );
}

function showRows(results) {
  element("rows").replaceChildren(
    ...results.map(({ text, tokens, milliseconds, errors }) => {
      const row = document.createElement("tr");
      const shader = tokens <= DECODE_MAX_ROWS ? "decode" : "prefill";
      const cells = [text, tokens, shader, `${milliseconds.toFixed(1)} ms`];
      for (const cell of [...cells, scientific(Math.max(...errors))]) {
        row.insertCell().textContent = cell;
      }
      return row;
    }),
  );
}

function show({ manifest, name, encoder }, results) {
  const worst = manifest.layers.map((_, layer) => Math.max(...results.map((r) => r.errors[layer])));
  const maxError = Math.max(...worst);
  const times = results.map((r) => r.milliseconds).sort((a, b) => a - b);
  const weights = manifest.layers.flatMap(({ qkv, out, up, down }) => [qkv, out, up, down]);
  const before = weights.reduce((sum, w) => sum + 4 * (32 * w.blocks + 1) * w.columns, 0);
  element("adapter").textContent = name;
  element("bytes").textContent = megabytes(encoder.bytes);
  element("bytes-before").textContent = megabytes(before);
  element("max-error").textContent = scientific(maxError);
  element("max-error").dataset.value = maxError;
  element("tolerance").textContent = scientific(TOLERANCE);
  const good = maxError <= TOLERANCE;
  element("verdict").textContent = good ? "right" : "WRONG";
  element("verdict").className = `figure ${good ? "good" : "bad"}`;
  element("median-time").textContent = `${times[times.length >> 1].toFixed(1)} ms`;
  showSentences(results);
  showLayers(worst);
  showRows(results);
}

try {
  const loaded = await load();
  const run = async () => {
    setState("running", "Running …");
    show(loaded, await runAll(loaded));
    document.querySelector("main").hidden = false;
    if (document.body.dataset.state === "running") setState("done", "");
  };
  element("again").addEventListener("click", run);
  await run();
} catch (error) {
  setState("failed", String(error.message ?? error));
}
