"use strict";
(() => {
  const tip = document.getElementById("tip");

  function make(name, attributes, parent) {
    const element = document.createElementNS(parent.namespaceURI, name);
    for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
    parent.append(element);
    return element;
  }

  // Charts: the values under the pointer, or at the place that the arrow keys moved to.
  for (const plot of document.querySelectorAll("[data-chart]")) {
    const chart = JSON.parse(plot.dataset.chart), svg = plot.querySelector("svg");
    const cross = make("g", { visibility: "hidden" }, svg);
    const line = make("line", { class: "cross", y1: 10, y2: svg.viewBox.baseVal.height - 36 }, cross);
    const marks = chart.lines.map((l) => make("circle", { class: "mark " + l.kind, r: 4 }, cross));
    let at = chart.x.length;

    function show(index) {
      at = Math.max(0, Math.min(chart.x.length - 1, index));
      const px = chart.px[at], box = svg.getBoundingClientRect(), scale = box.width / svg.viewBox.baseVal.width;
      line.setAttribute("x1", px); line.setAttribute("x2", px);
      const rows = [chart.x[at]];
      chart.lines.forEach((l, i) => {
        const there = l.py[at] !== null;
        marks[i].setAttribute("visibility", there ? "inherit" : "hidden");
        if (there) { marks[i].setAttribute("cx", px); marks[i].setAttribute("cy", l.py[at]); rows.push(l.name + "  " + l.text[at]); }
      });
      cross.setAttribute("visibility", "visible");
      tip.textContent = rows.join("\n");
      tip.hidden = false;
      const width = tip.offsetWidth, x = box.left + px * scale;
      tip.style.left = Math.max(4, x + width + 18 < innerWidth ? x + 14 : x - width - 14) + "px";
      tip.style.top = Math.max(4, box.top + 14) + "px";
    }
    function hide() { cross.setAttribute("visibility", "hidden"); tip.hidden = true; }
    plot.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect(), x = (event.clientX - box.left) / box.width * svg.viewBox.baseVal.width;
      let best = 0;
      chart.px.forEach((px, i) => { if (Math.abs(px - x) < Math.abs(chart.px[best] - x)) best = i; });
      show(best);
    });
    plot.addEventListener("pointerleave", hide);
    plot.addEventListener("blur", hide);
    plot.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1, Home: -1e9, End: 1e9 }[event.key];
      if (event.key === "Escape") hide();
      if (step === undefined) return;
      event.preventDefault();
      show(at + step);
    });
  }

  // The confusion matrix: a cell opens its images; arrow keys go to the next cell that holds any.
  const source = document.getElementById("page-data"), target = document.getElementById("cell");
  const matrix = document.querySelector(".confusion");
  if (!target || !source) return;
  const { classes, cells } = JSON.parse(source.textContent);

  function open(button) {
    const [row, column] = button.dataset.cell.split(",").map(Number);
    const found = cells[row + "," + column] || [];
    const count = matrix.querySelector(`[data-cell="${row},${column}"]`)?.title.split(": ").pop() || found.length;
    for (const other of matrix.querySelectorAll("[aria-pressed]")) other.removeAttribute("aria-pressed");
    matrix.querySelector(`[data-cell="${row},${column}"]`)?.setAttribute("aria-pressed", "true");
    const title = document.createElement("h3");
    title.textContent = row === column ? `${classes[row]}, rightly called: ${count}` : `${classes[row]} called ${classes[column]}: ${count}`;
    const note = document.createElement("p");
    note.className = "quiet";
    note.textContent = found.length ? `${found.length} shown, highest loss first.` : "No thumbnails of these images are in this page.";
    const gallery = document.createElement("div");
    gallery.className = "gallery";
    for (const [name, probability, uri, width, height] of found) {
      const figure = document.createElement("figure"), image = document.createElement("img"), words = document.createElement("figcaption");
      image.className = "thumb" + (Math.max(width, height) <= 48 ? " tiny" : "");
      image.src = uri;
      image.alt = `${name}: ${classes[row]}, called ${classes[column]}`;
      const file = document.createElement("small"), text = document.createElement("bdi");
      file.className = "file"; file.title = name; text.textContent = name; file.append(text);
      words.append(`${classes[column]} ${(100 * probability).toFixed(0)} %`, file);
      figure.append(image, words);
      gallery.append(figure);
    }
    target.replaceChildren(title, note, gallery);
  }

  document.addEventListener("click", (event) => {
    const button = event.target.closest("[data-cell]");
    if (!button) return;
    open(button);
    if (button.className === "link") target.scrollIntoView({ block: "nearest" });
  });
  if (!matrix) return;
  const buttons = [...matrix.querySelectorAll("button")];
  const first = buttons.find((b) => b.classList.contains("miss")) || buttons[0];
  if (first) first.tabIndex = 0; // one stop for the tab key; arrows move inside
  matrix.addEventListener("keydown", (event) => {
    const move = { ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1] }[event.key];
    const from = event.target.closest("button");
    if (!move || !from) return;
    event.preventDefault();
    const rows = [...matrix.tBodies[0].rows].map((r) => [...r.querySelectorAll("td")]);
    let row = rows.findIndex((r) => r.includes(from.parentNode)), column = rows[row].indexOf(from.parentNode);
    do { row += move[0]; column += move[1]; } while (rows[row]?.[column] && !rows[row][column].firstChild);
    const next = rows[row]?.[column]?.firstChild;
    if (!next) return;
    from.tabIndex = -1;
    next.tabIndex = 0;
    next.focus();
  });
})();
