// Sorts and filters the leaderboard in the reader's browser; works offline and without any library.
document$.subscribe(({ body }) => {
  const table = body.querySelector("#leaderboard-table");
  if (!table) return;
  const heads = [...table.tHead.rows[0].cells];
  const rows = [...table.tBodies[0].rows];
  const names = heads.map((head) => head.dataset.column);
  const at = (row, name) => row.cells[names.indexOf(name)];
  const textOf = (row, name) => at(row, name).textContent;
  const valueOf = (row, index) => {
    const given = row.cells[index].dataset.value;
    return given === undefined ? row.cells[index].textContent : Number(given);
  };

  // What a reader compares first; numbers of one kind, scope, norm and model.
  const start = { model: "minilm", kind: "proved", scope: "point", norm: "l2" };
  const form = document.createElement("form");
  form.id = "leaderboard-filters";
  form.addEventListener("submit", (event) => event.preventDefault());
  const search = document.createElement("input");
  search.type = "search";
  search.placeholder = "bound or source";
  search.setAttribute("aria-label", "bound or source");
  form.append(search);
  const selects = Object.keys(start).map((name) => {
    const label = document.createElement("label");
    const select = document.createElement("select");
    const values = [...new Set(rows.map((row) => textOf(row, name)))].sort();
    select.append(new Option("all", ""), ...values.map((value) => new Option(value, value)));
    select.value = values.includes(start[name]) ? start[name] : "";
    select.dataset.column = name;
    label.append(`${name} `, select);
    form.append(label);
    return select;
  });
  const count = document.createElement("output");
  form.append(count);

  const filter = () => {
    const wanted = search.value.trim().toLowerCase();
    let shown = 0;
    for (const row of rows) {
      const words = `${textOf(row, "bound")} ${textOf(row, "source")}`.toLowerCase();
      const fits = selects.every(({ value, dataset }) => !value || textOf(row, dataset.column) === value);
      row.hidden = !(fits && words.includes(wanted));
      shown += !row.hidden;
    }
    // A column that says the same in every row takes the room of the numbers, most of all on a phone.
    const chosen = selects.filter(({ value }) => value).map(({ dataset }) => dataset.column);
    const visible = rows.filter((row) => !row.hidden);
    const same = visible.length && visible.every((row) => textOf(row, "radius") === "-") ? ["radius"] : [];
    const left = [...chosen, ...same];
    for (const { cells } of [table.tHead.rows[0], ...rows]) {
      names.forEach((name, index) => (cells[index].hidden = left.includes(name)));
    }
    const mixed = selects.filter(({ value, dataset }) => !value && dataset.column !== "model");
    const warning = mixed.length ? "; of several kinds, scopes or norms: not to be ranked against each other" : "";
    count.textContent = `${shown} of ${rows.length} rows${warning}`;
  };
  form.addEventListener("input", filter);

  heads.forEach((head, index) => {
    const button = document.createElement("button");
    button.type = "button";
    button.append(...head.childNodes);
    head.append(button);
    button.addEventListener("click", () => {
      const ascending = head.getAttribute("aria-sort") !== "ascending";
      heads.forEach((other) => other.removeAttribute("aria-sort"));
      head.setAttribute("aria-sort", ascending ? "ascending" : "descending");
      const numeric = (value) => typeof value === "number";
      rows.sort((one, other) => {
        const [a, b] = [valueOf(one, index), valueOf(other, index)];
        if (numeric(a) !== numeric(b)) return numeric(a) ? -1 : 1; // a dash comes last
        return (a < b ? -1 : a > b ? 1 : 0) * (ascending ? 1 : -1);
      });
      table.tBodies[0].append(...rows);
    });
  });
  const wrapper = table.closest(".md-typeset__scrollwrap") || table;
  wrapper.before(form);
  heads[names.indexOf("median")].setAttribute("aria-sort", "ascending"); // as the page was made
  filter();
});
