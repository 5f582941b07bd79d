"use strict";
(() => {
  // All text goes in as text nodes: nothing that a user wrote is ever read as HTML.
  const data = JSON.parse(document.getElementById("data").textContent);
  const FIRST_CARDS = 5;
  const NUMBERS = ["number", "signed", "heat"];

  function make(tag, attributes, ...children) {
    const node = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes || {})) {
      if (name.startsWith("on")) node.addEventListener(name.slice(2), value);
      else if (value === true) node.setAttribute(name, "");
      else if (value !== false && value !== null) node.setAttribute(name, value);
    }
    node.append(...children.filter((child) => child !== null));
    return node;
  }

  function number(value) {
    if (value === null) return "";
    if (value === 0 || Number.isInteger(value)) return String(value);
    const size = Math.abs(value);
    const text = size >= 0.001 && size < 1e5 ? String(Number(value.toPrecision(3))) : value.toExponential(1);
    return text.replace("-", "−");
  }

  const signed = (value) => (value > 0 ? "+" : "") + number(value);

  // ---- samples

  function sample(kind, index, lines, side) {
    const image = data.images[kind][index];
    const text = data.texts[kind][index];
    const name = (kind === "test" ? "test " : "train ") + index;
    const label = data.labels[kind][index];
    const shown = label === undefined ? [name, ...lines] : [name, "label " + label, ...lines];
    const caption = make("figcaption", { class: side || false });
    shown.forEach((line, place) => caption.append(...(place ? [make("br")] : []), line));
    const what = [];
    if (image) what.push(make("img", { src: "data:image/png;base64," + image, alt: "", width: 48, height: 48 }));
    if (text !== undefined) what.push(make("p", {}, text));
    return make("figure", text === undefined ? {} : { class: "text" }, ...what, caption);
  }

  function cards(list, side, open) {
    const shown = open ? list : list.slice(0, FIRST_CARDS);
    return make("div", { class: "cards" }, ...shown.map(([index, influence, error]) =>
      sample("train", index, [signed(influence) + (error === undefined ? "" : " ± " + number(error))], side)));
  }

  // ---- cells, by the kind of their column

  const cells = {
    text: (value) => make("td", {}, value === null ? "" : String(value)),
    number: (value) => make("td", { class: "number" }, number(value)),
    signed: (value) => make("td", { class: "number " + (value < 0 ? "harmful" : "helpful") }, signed(value)),
    train: (value) => make("td", {}, sample("train", value, [])),
    test: (value) => make("td", {}, sample("test", value, [])),
    helpful: (value, open) => make("td", {}, cards(value, "helpful", open)),
    harmful: (value, open) => make("td", {}, cards(value, "harmful", open)),
    heat: (value, open, column) => {
      const share = Math.min(Math.max(-value / (column.largest || 1), 0), 1);
      const cell = make("td", { class: "number heat" }, signed(Number(value.toPrecision(2))));
      cell.style.setProperty("--share", share.toFixed(2));
      return cell;
    },
  };
  const isList = (kind) => kind === "helpful" || kind === "harmful";

  function key(value, kind) {
    if (isList(kind)) return value.length ? value[0][1] : 0;
    return value;
  }

  function compare(a, b) {
    if (a === null || b === null) return a === b ? 0 : a === null ? 1 : -1;
    if (typeof a === "number" && typeof b === "number") return a - b;
    return String(a).localeCompare(String(b), undefined, { numeric: true });
  }

  function words(row, columns) {
    return row.map((value, place) => {
      const kind = columns[place].kind;
      if (isList(kind)) return "";
      if (kind !== "train" && kind !== "test") return value;
      const parts = [kind, value, data.labels[kind][value], data.texts[kind][value]];
      return parts.filter((part) => part !== undefined).join(" ");
    }).join(" ").toLowerCase();
  }

  // ---- a table that sorts, filters and pages

  function table(spec, place) {
    const { columns, rows } = spec;
    const name = "table-" + place;
    const searched = rows.map((row) => words(row, columns));
    const state = { sort: null, down: false, page: 0, size: spec.size || 10, text: "", choice: "", open: new Set() };
    let order = rows.map((_, i) => i);

    const head = make("tr");
    const body = make("tbody");
    const status = make("p", { class: "dim", role: "status" });
    const buttons = columns.map((column, i) => {
      const arrow = make("span", { "aria-hidden": "true" });
      const button = make("button", { type: "button", onclick: () => sortBy(i) }, column.name + " ", arrow);
      const side = NUMBERS.includes(column.kind) && "number";
      const cell = make("th", { scope: "col", class: side, title: column.hint || false }, button);
      head.append(cell);
      return { cell, arrow };
    });
    const lists = columns.some((column) => isList(column.kind));

    function sortBy(i) {
      const first = columns[i].first === "down";
      state.down = state.sort === i ? !state.down : first;
      state.sort = i;
      state.page = 0;
      update();
    }

    function update() {
      const text = state.text.toLowerCase();
      order = rows.map((_, i) => i).filter((i) =>
        (!text || searched[i].includes(text)) &&
        (!state.choice || String(rows[i][spec.choice]) === state.choice));
      if (state.sort !== null) {
        const { kind } = columns[state.sort];
        const side = state.down ? -1 : 1;
        order.sort((a, b) => {
          const x = key(rows[a][state.sort], kind);
          const y = key(rows[b][state.sort], kind);
          const missing = x === null || y === null;
          return (missing ? 1 : side) * compare(x, y) || a - b;
        });
      }
      buttons.forEach(({ cell, arrow }, i) => {
        const sorted = i === state.sort;
        cell.setAttribute("aria-sort", !sorted ? "none" : state.down ? "descending" : "ascending");
        arrow.textContent = !sorted ? "↕" : state.down ? "▼" : "▲";
      });
      draw();
    }

    function draw() {
      const pages = Math.max(Math.ceil(order.length / state.size), 1);
      state.page = Math.min(state.page, pages - 1);
      const from = state.page * state.size;
      const shown = order.slice(from, from + state.size);
      body.replaceChildren(...shown.map(line));
      back.disabled = first.disabled = state.page === 0;
      next.disabled = last.disabled = state.page === pages - 1;
      const range = order.length ? `Rows ${from + 1} to ${from + shown.length} of ${order.length}` : "No rows";
      status.textContent = range + (order.length < rows.length ? ` (filtered from ${rows.length})` : "");
    }

    function line(i) {
      const open = state.open.has(i);
      const drawn = rows[i].map((value, j) => cells[columns[j].kind](value, open, columns[j]));
      if (lists) drawn[0].append(more(i, open));
      return make("tr", {}, ...drawn);
    }

    function more(i, open) {
      if (!rows[i].some((value, j) => isList(columns[j].kind) && value.length > FIRST_CARDS)) return "";
      const button = make("button", { type: "button", "aria-expanded": String(open), onclick: () => {
        if (open) state.open.delete(i); else state.open.add(i);
        draw();
        body.rows[order.indexOf(i) - state.page * state.size].querySelector("button").focus();
      } }, open ? "less" : "more");
      button.setAttribute("aria-label", (open ? "Show fewer" : "Show more") + " samples of row " + (i + 1));
      return button;
    }

    function go(page) {
      state.page = Math.max(page, 0);
      draw();
    }
    const turn = (label, text, page) =>
      make("button", { type: "button", "aria-label": label, onclick: () => go(page()) }, text);
    const first = turn("First page", "«", () => 0);
    const back = turn("Previous page", "‹", () => state.page - 1);
    const next = turn("Next page", "›", () => state.page + 1);
    const last = turn("Last page", "»", () => Infinity);

    const search = make("input", { type: "search", id: name + "-filter", oninput: (event) => {
      state.text = event.target.value;
      state.page = 0;
      update();
    } });
    const sizes = make("select", { onchange: (event) => {
      state.size = Number(event.target.value);
      state.page = 0;
      draw();
    } }, ...[10, 25, 100].map((size) => make("option", { selected: size === state.size }, String(size))));
    const controls = make("div", { class: "controls" }, make("label", {}, "Filter", search));
    if (spec.choice !== undefined && spec.choice !== null) controls.append(choices());
    controls.append(make("label", {}, "Rows", sizes),
      make("span", { role: "group", "aria-label": "Pages of " + spec.title }, first, " ", back, " ", next, " ", last));

    function choices() {
      const column = spec.choice;
      const values = [...new Set(rows.map((row) => String(row[column])))].sort(compare);
      const select = make("select", { onchange: (event) => {
        state.choice = event.target.value;
        state.page = 0;
        update();
      } }, make("option", { value: "" }, "all"), ...values.map((value) => make("option", { value }, value)));
      return make("label", {}, columns[column].name, select);
    }

    const whole = make("table", {}, make("caption", {}, spec.caption), make("thead", {}, head), body);
    const region = make("div", { class: "scroll", role: "region", tabindex: "0", "aria-label": spec.title + ", table" }, whole);
    const section = make("section", { "aria-labelledby": name }, make("h2", { id: name }, spec.title),
      make("p", {}, spec.text), ...(rows.length ? [controls, status, region] : [make("p", { class: "dim" }, spec.empty)]));
    if (rows.length) {
      if (spec.sort !== undefined && spec.sort !== null) sortBy(spec.sort);
      else update();
    }
    return section;
  }

  const host = document.getElementById("tables");
  data.tables.forEach((spec, place) => host.append(table(spec, place)));

  // ---- light and dark

  const button = document.getElementById("theme");
  const root = document.documentElement;
  const dark = () => root.dataset.theme
    ? root.dataset.theme === "dark"
    : matchMedia("(prefers-color-scheme: dark)").matches;
  const show = () => button.setAttribute("aria-pressed", String(dark()));
  button.addEventListener("click", () => {
    root.dataset.theme = dark() ? "light" : "dark";
    show();
  });
  show();
})();
