// Everything shown is text of the data, put in by textContent: no markup is ever made of it.
const data = JSON.parse(document.getElementById("data").textContent);
const SVG = "http://www.w3.org/2000/svg";
const byId = (id) => document.getElementById(id);
const chosen = { input: 0, layer: 0, head: 0, field: "constant" };

const FIELDS = {
  constant: ["constant", "The largest factor by which the head alone stretches a small move of the input: exact, or a probable upper bound."],
  bound: ["proved bound", "The smallest proved upper bound of the constant of the head alone."],
  ratio: ["bound over truth, at most", "The proved bound over a lower bound: the proved bound is at most that many times too large."],
  g_1: ["largest g\u2081 of a row", "Bound on the norm of the softmax Jacobian of a row; 0.5 is the most there can be."],
  entropy: ["entropy", "Entropy of the attention of a query in nats, mean over queries: 0 where each query sees one key."],
  sink_share: ["share of the sink", "Share of all attention that goes to the one key that gets most."],
};

const isNarrow = () => window.innerWidth < 520; // a phone
const input = () => data.inputs[chosen.input];
const layer = () => input().layers[chosen.layer];
const head = () => layer().heads[chosen.head];

function put(parent, name, text, attributes = {}) {
  const svg = parent.namespaceURI === SVG;
  const element = svg ? document.createElementNS(SVG, name) : document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  if (text !== undefined && text !== null) element.textContent = text;
  parent.append(element);
  return element;
}

// A number with what it promises; the exact value is in the title.
function putNumber(parent, name, number) {
  const element = put(parent, name, number ? number.shown : "\u2013");
  if (number) {
    element.title = String(number.value) + (number.method ? `, ${promise(number)}` : "");
    element.dataset.value = String(number.value);
  }
  return element;
}

function promise(number) {
  const chance = number.delta ? `, fails with a chance of at most ${number.delta}` : "";
  const method = number.method === "ratio" ? "" : ` (${number.method})`;
  return (number.method === "exact" ? "exact, proved" : number.kind) + chance + method;
}

const clip = (text, length) => {
  const letters = [...text];
  return letters.length > length ? letters.slice(0, length - 1).join("") + "\u2026" : text;
};

// Text that may run from right to left must not reorder what stands beside it.
const apart = (text) => `\u2068${text}\u2069`;
const quoted = (text) => `\u201c${apart(text)}\u201d`;

// The stylesheet has the two ends, so that a change from light to dark needs no drawing.
const shade = (share) => `color-mix(in oklab, var(--high) ${(100 * share).toFixed(1)}%, var(--low))`;

function showTop() {
  byId("model").textContent = data.model;
  byId("summary").textContent = input().summary;
  byId("run").textContent =
    `Input: ${apart(input().name)} \u2013 weights ${data.dtype} on ${data.device}, seed ${data.seed}, torch ${data.torch}.`;
  byId("version").textContent = data.lipbounds;
  showInputs();
  const notes = byId("notes");
  notes.replaceChildren();
  for (const one of input().skipped) put(notes, "li", `Left out, layer ${one.layer}: ${one.reason}`);
  for (const warning of input().warnings) put(notes, "li", `Warning: ${warning}.`);
  for (const note of input().notes) put(notes, "li", note);
}

// With more than one input: what is most fragile at each, and the way to it.
function showInputs() {
  byId("inputs").hidden = data.inputs.length < 2;
  const table = byId("input-table");
  table.replaceChildren();
  const top = put(put(table, "thead"), "tr");
  for (const title of ["Input", "Most fragile layer", "Proved bound", "Constant", "Lower bound"]) put(top, "th", title, { scope: "col" });
  const body = put(table, "tbody");
  data.inputs.forEach((one, i) => {
    const row = put(body, "tr");
    const name = put(put(row, "th", null, { scope: "row" }), "button", apart(one.name), { type: "button" });
    name.setAttribute("aria-pressed", String(i === chosen.input));
    name.dataset.input = i;
    name.addEventListener("click", () => {
      chosen.input = i;
      startAtWorst();
    });
    const worst = one.fragile_layer === null ? null : one.layers[one.fragile_layer];
    put(row, "td", worst ? String(worst.layer) : "\u2013");
    for (const number of worst ? [worst.bound, worst.constant, worst.lower] : [null, null, null]) putNumber(row, "td", number);
  });
}

function showLayers() {
  const table = byId("layers");
  table.replaceChildren();
  const heads = Math.max(...input().layers.map((one) => one.heads.length));
  const top = put(put(table, "thead"), "tr");
  for (const title of ["Layer", "Proved bound", "Constant", "Lower bound", "Ratio at most"]) {
    put(top, "th", title, { scope: "col" });
  }
  for (let i = 0; i < heads; i++) put(top, "th", i ? String(i) : "Head 0", { scope: "col", class: "of-head" });
  const scale = scaleOf(chosen.field);
  const body = put(table, "tbody");
  input().layers.forEach((one, position) => {
    const row = put(body, "tr");
    const name = put(row, "th", String(one.layer), { scope: "row" });
    // What tells modules apart stands at the end of their names: the style cuts them at the start.
    put(name, "small", `\u2066${one.module}\u2069`, { title: one.module });
    for (const number of [one.bound, one.constant, one.lower, one.ratio]) putNumber(row, "td", number);
    one.heads.forEach((each, i) => putCell(put(row, "td", null, { class: "cell of-head" }), one, each, position, i, scale));
  });
  byId("field-words").textContent = FIELDS[chosen.field][1];
  byId("ramp-low").textContent = scale.low;
  byId("ramp-high").textContent = scale.high;
}

function putCell(cell, one, each, position, i, scale) {
  const number = each.cells[chosen.field];
  const button = putNumber(cell, "button", number);
  button.type = "button";
  button.dataset.layer = position;
  button.dataset.head = i;
  const pressed = position === chosen.layer && i === chosen.head;
  button.setAttribute("aria-pressed", String(pressed));
  button.setAttribute("aria-label", `Layer ${one.layer}, head ${each.head}: ${number ? number.shown : "not computed"}`);
  if (number) {
    const share = scale.share(number);
    button.style.background = shade(share);
    button.classList.toggle("strong", share > 0.5);
  }
  button.addEventListener("click", () => choose(position, i));
}

// From 0, and the same for all layers and inputs, so that equal colours are equal numbers.
const LARGEST = { g_1: 0.5, sink_share: 1 };

function scaleOf(field) {
  const cells = data.inputs.flatMap((run) => run.layers.flatMap((one) => one.heads.map((each) => each.cells[field])));
  const finite = cells.filter((number) => number && Number.isFinite(Number(number.value)));
  const largest = finite.reduce((best, number) => (number.value > best.value ? number : best), { value: 0, shown: "0" });
  const high = LARGEST[field] ?? largest.value;
  const share = (number) => (high > 0 ? Math.min(1, Number(number.value) / high) : 0);
  return { share, low: "0", high: field in LARGEST ? String(high) : largest.shown };
}

function showHead() {
  const one = head();
  byId("head-title").textContent = `Layer ${layer().layer}, head ${one.head}`;
  byId("module").textContent = apart(layer().module);
  const list = byId("head-numbers");
  list.replaceChildren();
  const sink = quoted(layer().keys[one.sink]);
  const rows = [
    ["Proved bound", one.bound, one.bound && promise(one.bound)],
    ["Constant", one.constant, one.constant && promise(one.constant)],
    ["Lower bound", one.lower, one.lower && promise(one.lower)],
    ["Bound over truth, at most", one.ratio, ""],
    ["Entropy", one.cells.entropy, "nats"],
    ["Sink", one.cells.sink_share, `of all attention goes to ${sink}`],
  ];
  for (const [title, number, words] of rows) {
    const group = put(list, "div");
    put(group, "dt", title);
    const value = put(group, "dd");
    putNumber(value, "span", number).dataset.of = title;
    if (words) put(value, "small", ` ${words}`);
  }
  drawMap();
}

function choose(position, i) {
  chosen.layer = position;
  chosen.head = i;
  for (const button of byId("layers").querySelectorAll("button")) {
    const here = Number(button.dataset.layer) === position && Number(button.dataset.head) === i;
    button.setAttribute("aria-pressed", String(here));
  }
  showHead();
  showTokens();
  showBalls();
}

function putBar(list, label, number, share, act) {
  const item = put(list, "li");
  const name = act ? put(item, "button", label, { type: "button", title: label }) : put(item, "span", label);
  if (act) name.addEventListener("click", act);
  put(item, "i").style.width = `${100 * share}%`;
  putNumber(item, "b", number);
  return name;
}

function showFragileHeads() {
  const list = byId("fragile-heads");
  list.replaceChildren();
  const found = input().fragile_heads.map((place) => [place, input().layers[place.layer].heads[place.head]]);
  for (const [place, one] of found) {
    const label = `Layer ${input().layers[place.layer].layer}, head ${one.head}`;
    putBar(list, label, one.constant, one.constant.value / found[0][1].constant.value || 0, () => choose(place.layer, place.head));
  }
  if (!found.length) put(list, "li", "Not computed.");
}

function showTokens() {
  byId("tokens-title").textContent = `Most fragile tokens of layer ${layer().layer}`;
  const list = byId("fragile-tokens");
  list.replaceChildren();
  const found = layer().fragile_tokens;
  for (const token of found) {
    const number = layer().tokens[token];
    const label = putBar(list, `${token}: ${apart(layer().moving[token])}`, number, number.value / layer().tokens[found[0]].value || 0);
    putPatch(label, token);
  }
  if (!found.length) put(list, "li", "Not computed.");
}

// The patch of the picture behind a token, in front of its label.
function putPatch(label, token) {
  const [picture, grid] = [input().picture, layer().grid];
  if (!picture || !grid || token < grid.first) return;
  const [row, column] = [Math.floor((token - grid.first) / grid.columns), (token - grid.first) % grid.columns];
  const [width, height] = [picture.width / grid.columns, picture.height / grid.rows];
  const canvas = document.createElement("canvas");
  [canvas.width, canvas.height, canvas.className] = [width, height, "patch"];
  paint(canvas, picture, column * width, row * height);
  label.prepend(canvas);
}

// The part of the picture that begins at x, y, as large as the canvas.
function paint(canvas, picture, x, y) {
  const bytes = Uint8Array.from(atob(picture.rgb), (letter) => letter.charCodeAt(0));
  const drawing = canvas.getContext("2d");
  const pixels = drawing.createImageData(canvas.width, canvas.height);
  for (let i = 0; i < canvas.height; i++) {
    for (let j = 0; j < canvas.width; j++) {
      const from = 3 * ((y + i) * picture.width + x + j);
      pixels.data.set([bytes[from], bytes[from + 1], bytes[from + 2], 255], 4 * (i * canvas.width + j));
    }
  }
  drawing.putImageData(pixels, 0, 0);
}

function showWords() {
  const count = input().layers.reduce((sum, one) => sum + 1 + one.heads.length, 0);
  const words = [
    ["Constant", "The local Lipschitz constant in the l2 norm: the norm of the Jacobian of the attention block at this input. If the input of the block moves by a small step, its output moves at most that many times as far. The block is the attention with its output projection, without normalisation and residual."],
    ["Head alone", "The block that is left when all other heads are taken away. The outputs of the heads add up to that of the layer, so the constant of a layer is at most the sum of those of its heads."],
    ["Proved", `${sentence(data.words.kinds.proved)}, rounding included. \u201cExact\u201d is a proved bound that is the constant up to rounding.`],
    ["Probable", `${sentence(data.words.kinds.probable)}. For all ${count} constants of this input together the chance is at most ${count} times that.`],
    ["Lower", `${sentence(data.words.kinds.lower)}.`],
    ["Ratio at most", "The smallest proved bound over the lower bound: the proved bound is at most that many times the truth."],
    ["At the point", `${sentence(data.words.scopes.point)}.`],
    ["On a ball", `${sentence(data.words.scopes.ball)}.`],
    ["g\u2081", "p\u2081(1 \u2212 p\u2081 + p\u2082) of the two largest entries of a row of attention, rounded up: a proved bound on the l2 norm of the Jacobian of its softmax (Yudin et al. 2025). Near 0 where attention is one-hot or spread evenly over many keys, 0.5 where two keys share it."],
    ["Digits", "Upper bounds are rounded up and lower bounds down. The exact float64 value appears when the pointer rests on a number, and is in the JSON file."],
  ];
  const list = byId("words");
  list.replaceChildren();
  for (const [term, text] of words) {
    put(list, "dt", term);
    put(list, "dd", text);
  }
}

const sentence = (text) => text[0].toUpperCase() + text.slice(1);

function showAll() {
  showTop();
  showLayers();
  showFragileHeads();
  showWords();
  choose(chosen.layer, chosen.head);
}

function start() {
  for (const [name, [title]] of Object.entries(FIELDS)) put(byId("field"), "option", title, { value: name });
  byId("field").addEventListener("change", (event) => {
    chosen.field = event.target.value;
    showLayers();
  });
  const fold = byId("fold");
  const setFold = (folded) => {
    byId("layers").classList.toggle("folded", folded);
    fold.setAttribute("aria-expanded", String(!folded));
    fold.textContent = folded ? "Show heads" : "Hide heads";
  };
  fold.addEventListener("click", () => setFold(!byId("layers").classList.contains("folded")));
  setFold(isNarrow());
  window.addEventListener("resize", showBalls);
  startAtWorst();
}

// The layer of the sentence at the top, with its most fragile head.
function startAtWorst() {
  const place = input().fragile_layer ?? 0;
  const size = (one) => Number((one.constant || one.bound || { value: 0 }).value);
  const heads = input().layers[place].heads;
  [chosen.layer, chosen.head] = [place, heads.reduce((best, one, i) => (size(one) > size(heads[best]) ? i : best), 0)];
  showAll();
}

start();
