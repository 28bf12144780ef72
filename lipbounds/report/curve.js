// Bounds on balls over the radius, both axes logarithmic: the chosen layer in colour, the others pale.
const WIDE = { width: 620, height: 330, left: 56, right: 168, top: 14, bottom: 40 };
const NARROW = { ...WIDE, width: 350, right: 14 }; // of a phone: names stand on their lines
let CHART = WIDE;

function showBalls() {
  const here = layer();
  byId("balls-title").textContent = `Bounds on balls, layer ${here.layer}`;
  byId("input-norm").textContent = `, here ${here.input_norm.toPrecision(3)}`;
  const methods = [...new Set(here.balls.map((number) => number.method))];
  showBallTable(here, methods);
  drawCurve(here, methods);
}

function showBallTable(here, methods) {
  const table = byId("ball-table");
  table.replaceChildren();
  if (!methods.length) return put(table, "caption", "Not computed.");
  const radii = [...new Set(here.balls.map((number) => number.radius))];
  const top = put(put(table, "thead"), "tr");
  for (const title of ["Radius", ...radii.map(String)]) put(top, "th", title, { scope: "col" });
  const body = put(table, "tbody");
  for (const method of methods) {
    const row = put(body, "tr");
    put(row, "th", method, { scope: "row" });
    for (const radius of radii) {
      putNumber(row, "td", here.balls.find((number) => number.radius === radius && number.method === method));
    }
  }
}

function drawCurve(here, methods) {
  const svg = byId("curve");
  svg.replaceChildren();
  CHART = isNarrow() ? NARROW : WIDE;
  const finite = (numbers) => numbers.filter((number) => Number.isFinite(Number(number.value)) && number.value > 0);
  const lines = methods.map((method) => [method, finite(here.balls.filter((number) => number.method === method))]);
  const rest = input().layers.filter((one) => one !== here)
    .map((one) => finite(one.balls.filter((number) => number.method === methods[0])));
  const all = [...lines.map(([, numbers]) => numbers), ...rest].flat();
  svg.toggleAttribute("hidden", !all.length);
  if (!all.length) return;
  const values = all.map((number) => number.value);
  if (here.constant) values.push(here.constant.value);
  const axes = { x: axis(all.map((number) => number.radius), CHART.left, CHART.width - CHART.right),
    y: axis(values, CHART.height - CHART.bottom, CHART.top) };
  svg.setAttribute("viewBox", `0 0 ${CHART.width} ${CHART.height}`);
  svg.setAttribute("aria-label", `Bounds on balls of layer ${here.layer} over the radius; the table has the numbers`);
  drawAxes(svg, axes);
  const path = (numbers) => numbers.map((number, i) => `${i ? "L" : "M"}${axes.x.at(number.radius)},${axes.y.at(number.value)}`).join("");
  for (const numbers of rest) if (numbers.length) put(svg, "path", null, { d: path(numbers), class: "curve rest" });
  if (here.constant) {
    const y = axes.y.at(here.constant.value);
    put(svg, "line", null, { x1: CHART.left, x2: CHART.width - CHART.right, y1: y, y2: y, class: "level" });
  }
  const labels = here.constant ? [[axes.y.at(here.constant.value), "constant at the point", "quiet"]] : [];
  lines.filter(([, numbers]) => numbers.length).forEach(([method, numbers], i) => {
    const other = i ? " other" : "";
    put(svg, "path", null, { d: path(numbers), class: `curve${other}` });
    for (const number of numbers) {
      const dot = put(svg, "circle", null, { cx: axes.x.at(number.radius), cy: axes.y.at(number.value), r: 3.5, class: `dot${other}` });
      put(dot, "title", `${method}, radius ${number.radius}: ${number.shown}`);
    }
    labels.push([axes.y.at(numbers[numbers.length - 1].value), method, ""]);
  });
  putLabels(svg, labels);
}

// Labels at the right end of the lines, pushed apart where they would touch.
function putLabels(svg, labels) {
  labels.sort((a, b) => a[0] - b[0]);
  const place = CHART === NARROW ? { x: CHART.width - CHART.right, "text-anchor": "end" } : { x: CHART.width - CHART.right + 8 };
  let free = 0;
  for (const [y, label, kind] of labels) {
    const at = Math.max(CHART === NARROW ? y - 5 : y + 4, free);
    free = at + 15;
    put(svg, "text", label, { ...place, y: at, class: kind });
  }
}

// Ticks at powers of ten, and at twice and five times these where there would be few.
function axis(values, from, to) {
  const [low, high] = [Math.log10(Math.min(...values)) - 0.08, Math.log10(Math.max(...values)) + 0.08];
  const at = (value) => Math.round(10 * (from + ((Math.log10(value) - low) / (high - low)) * (to - from))) / 10;
  const steps = high - low < 2.5 ? [1, 2, 5] : [1];
  const every = Math.ceil((high - low) / 8);
  const ticks = [];
  for (let power = Math.floor(low); power <= high; power += every) {
    for (const step of steps) ticks.push(Number(`${step}e${power}`));
  }
  return { at, ticks: ticks.filter((value) => Math.log10(value) >= low && Math.log10(value) <= high) };
}

function drawAxes(svg, { x, y }) {
  const [bottom, right] = [CHART.height - CHART.bottom, CHART.width - CHART.right];
  for (const value of y.ticks) {
    const at = y.at(value);
    put(svg, "line", null, { x1: CHART.left, x2: right, y1: at, y2: at, class: "axis" });
    put(svg, "text", tick(value), { x: CHART.left - 8, y: at + 4, "text-anchor": "end", class: "quiet" });
  }
  put(svg, "line", null, { x1: CHART.left, x2: right, y1: bottom, y2: bottom, class: "axis" });
  for (const value of x.ticks) {
    const at = x.at(value);
    put(svg, "line", null, { x1: at, x2: at, y1: bottom, y2: bottom + 5, class: "axis" });
    put(svg, "text", tick(value), { x: at, y: bottom + 19, "text-anchor": "middle", class: "quiet" });
  }
  put(svg, "text", "radius", { x: right, y: bottom + 35, "text-anchor": "end", class: "quiet" });
}

const tick = (value) => (value >= 1e-3 && value < 1e5 ? String(value) : value.toExponential());
