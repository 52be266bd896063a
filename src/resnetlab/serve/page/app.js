"use strict";

const $ = (id) => document.getElementById(id);
const TOP = 5;
const state = { info: null, images: [], shown: null, heatFor: 0 };

/* Talking to the server */

async function ask(path, options) {
  let response;
  try {
    response = await fetch(path, options);
  } catch {
    throw new Error("The server cannot be reached. Is it still running?");
  }
  const body = await response.json().catch(() => null);
  if (response.ok && body) return body;
  if (response.ok) throw new Error("The server's answer was cut off.");
  if (response.status === 503 || response.status === 429) throw new Busy(body?.error?.message);
  throw new Error(plain(body?.error?.message || `The server answered ${response.status}.`, body?.error?.file));
}

class Busy extends Error {}

async function patiently(work) {
  for (let wait = 250; ; wait *= 2) {
    try {
      return await work();
    } catch (error) {
      if (!(error instanceof Busy) || wait > 4000) throw error;
      await new Promise((done) => setTimeout(done, wait));
    }
  }
}

/* Pictures that come in */

function take(files) {
  const images = [...files].filter((file) => file.size !== undefined);
  if (!images.length) return;
  forget();
  hideAlert();
  state.images = images.map((file) => ({ file, url: URL.createObjectURL(file), row: null, error: null }));
  $("drop").classList.add("compact");
  if (images.length === 1) one(state.images[0]);
  else many(state.images);
}

function forget() {
  for (const image of state.images) URL.revokeObjectURL(image.url);
  state.images = [];
  state.shown = null;
  $("rows").replaceChildren();
  for (const id of ["single", "batch"]) $(id).hidden = true;
}

async function one(image) {
  say("Looking…");
  const name = image.file.name || "the image";
  try {
    await refuseAtOnce(image.file);
    const reply = await patiently(() =>
      ask(`/predict?top=${TOP}`, { method: "POST", headers: { "Content-Type": "application/octet-stream" }, body: image.file }));
    if (!state.images.includes(image)) return;
    image.row = reply.images[0];
    show(image);
    say(`${name}: ${image.row.class}, ${percent(image.row.probability)}.`);
    $("verdict").focus({ preventScroll: true });
  } catch (error) {
    if (!state.images.includes(image)) return;
    say("");
    showAlert([`${name} could not be read.`, error.message]);
  }
}

async function many(images) {
  $("batch").hidden = false;
  $("csv").disabled = true;
  addRows(images);
  let done = 0;
  const total = images.length;
  for (const part of chunks(images)) {
    if (state.images !== images) return;
    say(`${done} of ${total} images done.`);
    await predictPart(part);
    if (state.images !== images) return;
    part.forEach(fillRow);
    done += part.length;
    $("progress").max = total;
    $("progress").value = done;
  }
  const broken = images.filter((image) => image.error).length;
  $("batchtitle").textContent = `${total} images`;
  $("csv").disabled = broken === total;
  $("progress").hidden = true;
  say(`${total} images done.`);
  if (broken) showAlert([`${broken} of ${total} images could not be read; the table says why.`]);
}

/** Groups of images that fit in a request. What is too large by itself is marked, not sent. */
function* chunks(images) {
  const { images: most, body_bytes: bytes } = state.info.limits;
  let part = [], size = 0;
  for (const image of images) {
    if (part.length && (part.length >= Math.min(most, 32) || size + image.file.size > bytes * 0.9)) {
      yield part;
      part = [];
      size = 0;
    }
    part.push(image);
    size += image.file.size;
  }
  if (part.length) yield part;
}

async function predictPart(part) {
  const form = new FormData();
  const sent = [];
  for (const image of part) {
    try {
      await refuseAtOnce(image.file);
      form.append("images", image.file, String(sent.length));
      sent.push(image);
    } catch (error) {
      image.error = error.message;
    }
  }
  if (!sent.length) return;
  try {
    const reply = await patiently(() => ask(`/predict?top=${TOP}&skip_broken=true`, { method: "POST", body: form }));
    for (const row of reply.images) sent[Number(row.file)].row = row;
    for (const row of reply.broken) sent[Number(row.file)].error = plain(row.message, row.file);
  } catch (error) {
    for (const image of sent) image.error = error.message;
  }
}

async function refuseAtOnce(file) {
  if (!file.size) throw new Error("The file is empty.");
  const most = state.info.limits.body_bytes * 0.98;
  if (file.size > most) throw new Error(`The file has ${megabytes(file.size)}; at most ${megabytes(most)} are read.`);
  try {
    await file.slice(0, 1).arrayBuffer();
  } catch {
    throw new Error("It is a folder, or a file that was changed or removed since it was chosen.");
  }
}

/* Showing what was found */

function show(image) {
  state.shown = image;
  const { row, url, file } = image;
  $("single").hidden = false;
  $("nopreview").hidden = true;
  const picture = $("picture");
  picture.hidden = false;
  picture.classList.remove("small");
  picture.alt = `Your image ${file.name || ""}`.trim();
  picture.onload = () => picture.classList.toggle("small", Math.max(picture.naturalWidth, picture.naturalHeight) <= 96);
  picture.onerror = () => {
    picture.hidden = true;
    $("nopreview").hidden = false;
  };
  picture.src = url;
  $("caption").textContent = file.name || "";
  $("verdict").textContent = row.class;
  $("sure").textContent = `${sureness(row.probability)} ${percent(row.probability)} probable.`;
  $("bars").replaceChildren(...row.top.map(bar));
  requestAnimationFrame(() => {
    for (const fill of $("bars").querySelectorAll(".fill")) fill.style.width = `${Number(fill.dataset.p) * 100}%`;
  });
  explain(image);
}

function bar(place) {
  const item = element("li");
  const track = element("div", "track");
  const fill = element("div", "fill");
  fill.dataset.p = place.probability;
  fill.style.width = "0";
  track.append(fill);
  track.setAttribute("aria-hidden", "true");
  item.append(element("span", "name", place.class), element("span", "value", percent(place.probability)), track);
  return item;
}

async function explain(image) {
  const heat = $("heat");
  heat.hidden = $("why").hidden = $("seen").hidden = true;
  if (!state.info.methods.length) return;
  const turn = ++state.heatFor;
  try {
    const reply = image.heat || (await patiently(() =>
      ask("/explain", { method: "POST", headers: { "Content-Type": "application/octet-stream" }, body: image.file })));
    image.heat = reply;
    if (turn !== state.heatFor || state.shown !== image) return;
    heat.onload = () => {
      heat.hidden = $("why").hidden = false;
      const whole = reply.box.every((value, at) => (at < 2 ? value <= 0 : value >= 1));
      $("seen").hidden = whole;
      place(reply);
      fade();
    };
    heat.src = reply.heat_png;
    heat.alt = `Heat map: where the network looks for ${reply.class}`;
  } catch {
    /* the answer stands without it */
  }
}

/** Lay the heat map over the part of the image that the network saw. */
function place(reply) {
  const picture = $("picture"), heat = $("heat");
  if (picture.hidden || !picture.naturalWidth) return;
  const box = picture.getBoundingClientRect(), stage = $("stage").getBoundingClientRect();
  const scale = Math.min(box.width / picture.naturalWidth, box.height / picture.naturalHeight);
  const width = picture.naturalWidth * scale, height = picture.naturalHeight * scale;
  const left = box.left - stage.left + (box.width - width) / 2, top = box.top - stage.top + (box.height - height) / 2;
  const [x0, y0, x1, y1] = reply.box || [0, 0, 1, 1];
  Object.assign(heat.style, {
    left: `${left + x0 * width}px`, top: `${top + y0 * height}px`,
    width: `${(x1 - x0) * width}px`, height: `${(y1 - y0) * height}px`,
  });
}

function fade() {
  const value = Number($("opacity").value);
  $("heat").style.opacity = value / 100;
  $("opacityvalue").textContent = `${value} %`;
  $("opacity").setAttribute("aria-valuetext", `${value} percent`);
}

/* The table */

function addRows(images) {
  $("batchtitle").textContent = `${images.length} images`;
  $("progress").max = images.length;
  $("progress").value = 0;
  $("progress").hidden = false;
  for (const image of images) {
    const row = element("tr");
    const preview = element("td");
    const thumb = element("img");
    thumb.alt = "";
    thumb.loading = "lazy";
    thumb.onerror = () => thumb.replaceWith(element("div", "blank"));
    thumb.src = image.url;
    preview.append(thumb);
    const name = element("td", "", image.file.name || "image");
    row.append(preview, name, element("td", "", "…"), element("td", "number"), element("td", "rest wide"));
    image.cells = [...row.children];
    $("rows").append(row);
  }
}

function fillRow(image) {
  const [, name, kind, probability, rest] = image.cells;
  if (image.error) {
    kind.textContent = image.error;
    kind.className = "why-not";
    kind.colSpan = 3;
    probability.remove();
    rest.remove();
    return;
  }
  const open = element("button", "open", image.file.name || "image");
  open.type = "button";
  open.addEventListener("click", () => {
    show(image);
    $("verdict").focus();
    $("single").scrollIntoView({ block: "nearest" });
    say(`${image.file.name}: ${image.row.class}, ${percent(image.row.probability)}.`);
  });
  name.replaceChildren(open);
  kind.textContent = image.row.class;
  probability.textContent = percent(image.row.probability);
  rest.textContent = image.row.top.slice(1, 3).map((t) => `${t.class} ${percent(t.probability)}`).join("  ·  ");
}

function csv() {
  const done = state.images.filter((image) => image.row);
  const places = Math.max(1, ...done.map((image) => image.row.top.length));
  const head = ["file", "class", "probability"];
  for (let n = 2; n <= places; n++) head.push(`class_${n}`, `probability_${n}`);
  const lines = done.map(({ file, row }) => [file.name, ...row.top.flatMap((t) => [t.class, t.probability])]);
  const text = [head, ...lines].map((line) => line.map(cell).join(",") + "\n").join("");
  const link = element("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "text/csv" }));
  link.download = "predictions.csv";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

/** A cell as a spreadsheet reads it; text that it would take for a formula is marked as text. */
function cell(value) {
  let text = String(value);
  if (typeof value === "string" && /^[=+\-@\t\r]/.test(text)) text = `'${text}`;
  return /[",\n\r]/.test(text) ? `"${text.replaceAll('"', '""')}"` : text;
}

/* The camera */

async function openCamera() {
  hideAlert();
  $("camera").disabled = true;
  try {
    const stream = await navigator.mediaDevices.getUserMedia({ video: { facingMode: "environment" } });
    $("video").srcObject = stream;
    $("shoot").showModal();
  } catch {
    showAlert(["The camera cannot be used. Perhaps it is in use, or the browser was not allowed to."]);
  } finally {
    $("camera").disabled = false;
  }
}

function closeCamera() {
  for (const track of $("video").srcObject?.getTracks() || []) track.stop();
  $("video").srcObject = null;
}

function shoot() {
  const video = $("video"), canvas = element("canvas");
  canvas.width = video.videoWidth;
  canvas.height = video.videoHeight;
  if (!canvas.width) return;
  canvas.getContext("2d").drawImage(video, 0, 0);
  canvas.toBlob((blob) => {
    $("shoot").close();
    take([new File([blob], "camera.png", { type: "image/png" })]);
  }, "image/png");
}

/* Small things */

function element(tag, name = "", text = "") {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text !== "") made.textContent = text;
  return made;
}

const say = (text) => ($("status").textContent = text);
const megabytes = (bytes) => `${(bytes / 2 ** 20).toFixed(bytes < 10 * 2 ** 20 ? 1 : 0)} MB`;

function percent(p) {
  if (p > 0.999) return "> 99.9 %";
  return p < 0.001 ? "< 0.1 %" : `${(p * 100).toFixed(1)} %`;
}

function sureness(p) {
  return p >= 0.9 ? "It is sure:" : p >= 0.6 ? "It is fairly sure:" : p >= 0.35 ? "It is not sure:" : "It is guessing:";
}

/** The reason without what comes before it: the name is said already. */
function plain(message, file) {
  const text = file && message.startsWith(`${file}: `) ? message.slice(file.length + 2) : message;
  return text.charAt(0).toUpperCase() + text.slice(1) + (/[.!?)]$/.test(text) ? "" : ".");
}

function showAlert(lines) {
  $("alert").replaceChildren(...lines.map((line) => element("p", "", line)));
  $("alert").hidden = false;
}

function hideAlert() {
  $("alert").hidden = true;
}

function listen() {
  $("pick").addEventListener("click", () => $("files").click());
  $("files").addEventListener("change", () => {
    take($("files").files);
    $("files").value = "";
  });
  let inside = 0;
  for (const name of ["dragenter", "dragover", "dragleave", "drop"]) {
    document.addEventListener(name, (event) => {
      event.preventDefault();
      inside = name === "drop" ? 0 : inside + (name === "dragenter") - (name === "dragleave");
      $("drop").classList.toggle("over", inside > 0);
      if (name === "drop") take(event.dataTransfer.files);
    });
  }
  document.addEventListener("paste", (event) => take(event.clipboardData.files));
  $("opacity").addEventListener("input", fade);
  $("csv").addEventListener("click", csv);
  $("clear").addEventListener("click", () => {
    forget();
    hideAlert();
    say("");
    $("drop").classList.remove("compact");
    $("pick").focus();
  });
  $("camera").addEventListener("click", openCamera);
  $("take").addEventListener("click", shoot);
  $("cancel").addEventListener("click", () => $("shoot").close());
  $("shoot").addEventListener("close", closeCamera);
  addEventListener("resize", () => state.shown?.heat && place(state.shown.heat));
}

async function start() {
  try {
    state.info = await patiently(() => ask("/info"));
  } catch (error) {
    showAlert([error.message]);
    return;
  }
  const { model, classes, report } = state.info;
  document.title = `${model} – ResNetLab`;
  $("model").textContent = `${model}, ${classes.length} classes`;
  $("report").hidden = !report;
  $("camera").hidden = !(navigator.mediaDevices?.getUserMedia && isSecureContext);
  listen();
  document.body.dataset.ready = "yes";
}

start();
