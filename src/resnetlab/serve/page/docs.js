"use strict";

function element(tag, name, text) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text) made.textContent = text;
  return made;
}

function words(description) {
  return (description || "").split(/\n\s*\n/).map((text) => element("p", "", text.replace(/`/g, "")));
}

function example(path, verb, operation) {
  const url = location.origin + path;
  if (verb === "get") return `curl ${url}`;
  const one = `curl --data-binary @cat.jpg -H 'Content-Type: image/jpeg' ${url}`;
  return operation.requestBody?.content["multipart/form-data"] && path === "/predict"
    ? `${one}\ncurl -F images=@cat.jpg -F images=@dog.png ${url}`
    : one;
}

function article(path, verb, operation) {
  const card = element("article");
  const title = element("h2");
  title.append(element("span", "verb", verb.toUpperCase()), element("code", "", path));
  card.append(title, ...words(operation.description || operation.summary));
  const parameters = operation.parameters || [];
  if (parameters.length) card.append(element("h3", "", "Parameters, in the address"));
  for (const parameter of parameters) {
    const line = element("p");
    const fallback = parameter.schema?.default;
    line.append(element("code", "", parameter.name), ` ${parameter.description || ""}`);
    if (fallback !== undefined && fallback !== "") line.append(` By default ${fallback}.`);
    card.append(line);
  }
  const answers = Object.entries(operation.responses || {}).filter(([status]) => status !== "200");
  if (answers.length > 1) {
    card.append(element("h3", "", "Errors"));
    for (const [status, answer] of answers) {
      const line = element("p");
      line.append(element("code", "", status), ` ${answer.description}`);
      card.append(line);
    }
  }
  card.append(element("pre", "", example(path, verb, operation)));
  return card;
}

async function start() {
  const place = document.getElementById("operations");
  try {
    const api = await (await fetch("/openapi.json")).json();
    document.getElementById("about").textContent = `${api.info.title}. ${api.info.description}`;
    for (const [path, verbs] of Object.entries(api.paths))
      for (const [verb, operation] of Object.entries(verbs)) place.append(article(path, verb, operation));
  } catch {
    place.append(element("p", "alert", "The description cannot be read. Is the server still running?"));
  }
}

start();
