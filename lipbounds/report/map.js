// The attention map of the chosen head, with g_1 of each row as a bar beside it.
const BAR = { gap: 16, width: 90 };
const LONGEST = 24; // letters of a label; longer ones are whole in their titles, and in the line below the map
const SINGLE = 4096; // cells up to which each is an element of its own
const SHADES = 32; // of the cells of larger maps, which share one element for each shade

function drawMap() {
  const svg = byId("map");
  svg.replaceChildren();
  const [one, here] = [head(), layer()];
  const [n, m] = [here.queries.length, here.keys.length];
  const size = Math.max(n, m) <= 24 ? 22 : Math.max(n, m) <= 48 ? 14 : 7;
  const labelled = size > 10;
  const room = (labels) => 14 + 7.4 * Math.min(LONGEST, Math.max(...labels.map((label) => [...label].length)));
  const left = labelled ? room(here.queries) : 12;
  const above = labelled ? room(here.keys) : 24;
  const bars = left + m * size + BAR.gap;
  const width = bars + BAR.width + 52;
  const height = above + n * size + 6;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.setAttribute("width", width);
  svg.setAttribute("height", height);
  svg.setAttribute("aria-label", `Attention of layer ${here.layer}, head ${one.head}, ${n} queries by ${m} keys`);
  const middle = size / 2 + 4;
  if (labelled) {
    here.queries.forEach((label, i) => {
      putLabel(svg, label, { x: left - 6, y: above + i * size + middle, "text-anchor": "end" });
    });
    here.keys.forEach((label, j) => {
      const [x, y] = [left + j * size + middle, above - 6];
      putLabel(svg, label, { x, y, transform: `rotate(-90 ${x} ${y})` });
    });
  }
  put(svg, "text", "g\u2081", { x: bars, y: above - 6, class: "quiet" });
  if (one.attention) (n * m <= SINGLE ? putCells : putShades)(svg, one.attention, { left, above, size });
  for (let i = 0; i < n; i++) {
    const y = above + i * size;
    const bar = put(svg, "rect", null, { x: bars, y: y + 2, width: BAR.width * (one.g_1[i] / 0.5), height: size - 5, class: "bar" });
    bar.dataset.value = one.g_1[i];
    if (labelled) {
      const x = bars + BAR.width * (one.g_1[i] / 0.5) + 5;
      put(svg, "text", String(one.g_1[i]), { x, y: y + middle, class: "quiet" });
    }
  }
  if (!one.attention) put(svg, "text", "Map left out: the file would be too large.", { x: left, y: above + 14, class: "quiet" });
  const cursor = put(svg, "rect", null, { width: size - 1, height: size - 1, class: "cursor" });
  watchMap(svg, { one, here, n, m, size, left, above, cursor });
}

function putLabel(svg, label, place) {
  const text = put(svg, "text", clip(label, LONGEST), place);
  if ([...label].length > LONGEST) put(text, "title", label);
}

function putCells(svg, attention, { left, above, size }) {
  attention.forEach((row, i) => row.forEach((p, j) => {
    const place = { x: left + j * size, y: above + i * size, width: size - 1, height: size - 1 };
    const cell = put(svg, "rect", null, { ...place, class: "p" });
    cell.dataset.value = p;
    cell.style.fill = shade(Math.sqrt(p));
  }));
}

function putShades(svg, attention, { left, above, size }) {
  const paths = Array.from({ length: SHADES + 1 }, () => []);
  const [side, back] = [size - 1, 1 - size];
  attention.forEach((row, i) => row.forEach((p, j) => {
    paths[Math.round(SHADES * Math.sqrt(p))].push(`M${left + j * size},${above + i * size}h${side}v${side}h${back}z`);
  }));
  paths.forEach((parts, level) => {
    if (parts.length) put(svg, "path", null, { d: parts.join(""), class: "shade" }).style.fill = shade(level / SHADES);
  });
}

// The pointer and the arrow keys choose a cell; the line below says what is in it.
function watchMap(svg, map) {
  let [i, j] = [0, map.one.sink];
  for (let row = 1; row < map.n; row++) if (map.one.g_1[row] > map.one.g_1[i]) i = row;
  const show = () => {
    map.cursor.setAttribute("x", map.left + j * map.size);
    map.cursor.setAttribute("y", map.above + i * map.size);
    const share = map.one.attention ? `${map.one.attention[i][j]} of its attention goes to key ${j}, ${quoted(map.here.keys[j])}; ` : "";
    byId("readout").textContent = `Query ${i}, ${quoted(map.here.queries[i])}: ${share}g\u2081 of this row is at most ${map.one.g_1[i]}.`;
    showPatches(map, i, j);
  };
  svg.onpointermove = svg.onpointerdown = (event) => {
    const box = svg.getBoundingClientRect();
    const row = Math.floor(((event.clientY - box.top) * (svg.viewBox.baseVal.height / box.height) - map.above) / map.size);
    const column = Math.floor(((event.clientX - box.left) * (svg.viewBox.baseVal.width / box.width) - map.left) / map.size);
    if (row < 0 || row >= map.n) return;
    i = row;
    if (column >= 0 && column < map.m) j = column;
    show();
  };
  svg.onkeydown = (event) => {
    const step = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    if (!step) return;
    event.preventDefault();
    i = Math.min(map.n - 1, Math.max(0, i + step[0]));
    j = Math.min(map.m - 1, Math.max(0, j + step[1]));
    show();
  };
  show();
}

// The two patches of the picture, where tokens are patches.
function showPatches(map, i, j) {
  const line = byId("patches");
  line.replaceChildren();
  line.hidden = !map.here.grid || map.here.queries.length !== map.here.moving.length;
  if (line.hidden) return;
  for (const [title, token] of [["query", i], ["key", j]]) putPatch(put(line, "span", ` ${title} `), token);
}
