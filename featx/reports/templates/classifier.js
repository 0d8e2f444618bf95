// What both pages that show a model's answers have: the service's, and the one that is a file. A page says how many
// photos are asked about AT_ONCE, and has five functions: taken(entry) gets a photo with its card before its answer;
// predict(entry, note) promises an answer as the service's, and may put a sentence below the photo's name by note(sentence);
// answered(entry, prediction) and failed(entry, error) show what came; further(entry) gives further columns of the table.
"use strict";
const at = (id) => document.getElementById(id);
const make = (tag, kind, text) => {
  const made = document.createElement(tag);
  if (kind) made.className = kind;
  if (text !== undefined) made.textContent = text;
  return made;
};
const SHOWN = 5, PAGE = 20;
const plural = (n, one, many) => `${n} ${n === 1 ? one : many}`;

// A picture made smaller: the canvas, and a JPEG of it, or null where the browser makes none.
function jpeg(bitmap, scale, quality) {
  const canvas = make("canvas");
  canvas.width = Math.max(1, Math.round(scale * bitmap.width));
  canvas.height = Math.max(1, Math.round(scale * bitmap.height));
  const drawing = canvas.getContext("2d");
  drawing.imageSmoothingQuality = "high";
  drawing.drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return new Promise((done) => canvas.toBlob((blob) => done({blob, canvas}), "image/jpeg", quality));
}

// --- showing ---

function bars(prediction) {
  const all = Object.entries(prediction.probabilities).sort((a, b) => b[1] - a[1]);
  const box = make("div", "bars");
  for (const [label, value] of all.slice(0, SHOWN)) {
    const track = make("div", "track"), fill = make("div", "fill");
    const text = `${(100 * value).toFixed(1)} %`;
    fill.style.width = `${100 * value}%`;
    track.setAttribute("role", "img");
    track.setAttribute("aria-label", `${label}: ${text}`);
    track.append(fill);
    box.append(make("span", "label", label), track, make("span", "value", text));
  }
  const out = [box];
  if (all.length > SHOWN) out.push(make("div", "more", `and ${plural(all.length - SHOWN, "more class", "more classes")}`));
  return out;
}

// A row of examples; picture(example) gives an image of one, or null where there is none.
function neighbours(title, found, picture) {
  const box = make("div", "near"), list = make("ul");
  box.append(make("h3", "", title),
    make("p", "note", "Similarity compares what the network sees: 1 is the same image, 0 is unrelated."), list);
  for (const each of found) {
    const item = make("li");
    if (each.id) item.title = each.id;
    item.append(picture(each) || make("div", "blank"), make("span", "", each.label),
      make("span", "score", `similarity ${each.score.toFixed(2)}`));
    list.append(item);
  }
  return box;
}

function tell(entry, prediction) {
  const card = entry.card, told = card.querySelector(".told");
  const kind = prediction.score_kind === "margin" ? ` (ahead of the next by ${prediction.score.toFixed(2)})` : "";
  told.querySelector("h2").textContent = prediction.label + kind;
  if (prediction.reason === "unknown") {
    told.querySelector("h2").textContent = "Unknown";
    told.append(make("div", "abstains", "Unlike the photos that this model was made from: it may show none of its classes."),
      make("p", "note", prediction.score_kind === "margin" ? `If it had to answer: ${prediction.label}${kind}.` : "If it had to answer:"));
  } else if (prediction.reason === "unsure") {
    told.querySelector("h2").textContent = `Not sure: perhaps ${prediction.label}${kind}`;
    told.append(make("div", "abstains", "Too uncertain to answer reliably."));
  }
  if (prediction.set && prediction.set.length > 1) {
    told.append(make("p", "note", `One of these nine times out of ten: ${prediction.set.join(", ")}.`));
  }
  told.append(...bars(prediction));
  if (typeof prediction.familiarity === "number") {
    const share = `${(100 * prediction.familiarity).toFixed(0)} %`;
    told.append(make("p", "note", `Familiarity ${share}: that share of the model's own photos looks at least as strange to it.`));
  }
  entry.prediction = prediction;
  card.dataset.state = "done";
}

function refuse(entry, message) {
  entry.message = message;
  entry.card.classList.add("failed");
  entry.card.querySelector("h2").textContent = message;
  entry.card.dataset.state = "failed";
}

// --- many results: a summary, a filter, a table to keep ---

const ASIDE = ["not sure", "unknown", "not read", "waiting"];
let entries = [], shown = PAGE;

const groupOf = (entry) => {
  const state = entry.card.dataset.state;
  if (state !== "done") return state === "failed" ? "not read" : "waiting";
  return {unsure: "not sure", unknown: "unknown"}[entry.prediction.reason] || `label:${entry.prediction.label}`;
};

function summarise() {
  const counts = new Map();
  for (const entry of entries) counts.set(groupOf(entry), (counts.get(groupOf(entry)) || 0) + 1);
  at("summary").hidden = entries.length < 2;
  const number = (name) => counts.get(name) || 0;
  const parts = [plural(entries.length, "photo", "photos")];
  for (const name of ASIDE) if (number(name)) parts.push(`${number(name)} ${name}`);
  at("counts").textContent = parts.join(", ");
  const chosen = at("filter").value;
  const labels = [...counts.keys()].filter((name) => name.startsWith("label:")).sort();
  const names = [...labels, ...ASIDE.filter(number)];
  at("filter").replaceChildren(new Option(`all (${entries.length})`, ""),
    ...names.map((name) => new Option(`${name.replace(/^label:/, "")} (${counts.get(name)})`, name)));
  at("filter").value = names.includes(chosen) ? chosen : "";
  const wanted = at("filter").value;
  let room = shown, left = 0;
  for (const entry of entries) {
    const fits = !wanted || groupOf(entry) === wanted;
    entry.card.hidden = !fits || room === 0;
    if (fits && room === 0) left++;
    if (fits && room > 0) room--;
  }
  at("more").hidden = left === 0;
  at("more").textContent = `Show ${Math.min(left, PAGE)} more of ${left}`;
}

function table() {
  // A cell that begins with one of these is a formula to a spreadsheet, and a file may have any name.
  const cell = (value) => `"${String(value).replace(/^[=+\-@\t\r]/, "'$&").replaceAll('"', '""')}"`;
  const extra = entries.length ? Object.keys(further(entries[0])) : [];
  const rows = [["file", "label", "score", "score_kind", "abstain", "error", "reason", "familiarity", ...extra]];
  for (const entry of entries) {
    const {file, prediction, message} = entry;
    rows.push([...(prediction
      ? [file.name, prediction.label, prediction.score, prediction.score_kind, prediction.abstain, "", prediction.reason ?? "",
        prediction.familiarity ?? ""]
      : [file.name, "", "", "", "", message || "not done", "", ""]), ...Object.values(further(entry))]);
  }
  return rows.map((row) => row.map((value) => typeof value === "number" ? value : cell(value)).join(",")).join("\r\n") + "\r\n";
}

// --- taking photos in ---

let queue = [], busy = 0;

function take(files) {
  const made = [...files].map((file) => {
    const card = make("li", "card"), picture = make("img"), told = make("div", "told");
    picture.alt = "";
    picture.loading = "lazy";
    picture.addEventListener("error", () => card.classList.add("bare"));
    told.append(make("h2", "", "…"), make("p", "name", file.name));
    card.append(picture, told);
    card.dataset.state = "waiting";
    const entry = {card, file};
    taken(entry);
    return entry;
  });
  at("results").prepend(...made.map((entry) => entry.card));  // what came last on top, in the order it was given
  entries = [...made, ...entries];
  queue.push(...made);
  summarise();
  work();
}

function work() {
  while (queue.length && busy < AT_ONCE) {
    const entry = queue.shift();
    busy++;
    predict(entry, (text) => entry.card.querySelector(".name").after(make("p", "note", text)))
      .then((prediction) => answered(entry, prediction))
      .catch((error) => failed(entry, error))
      .finally(() => { busy--; summarise(); work(); });
  }
}

// --- choosing ---

at("filter").addEventListener("change", () => { shown = PAGE; summarise(); });
at("more").addEventListener("click", () => { shown += PAGE; summarise(); });
at("csv").addEventListener("click", () => {
  const link = make("a");
  link.href = URL.createObjectURL(new Blob(["\ufeff", table()], {type: "text/csv"}));
  link.download = "featx-results.csv";
  link.click();
  URL.revokeObjectURL(link.href);
});
at("drop").addEventListener("click", () => at("files").click());
at("files").addEventListener("change", (event) => { take(event.target.files); event.target.value = ""; });
addEventListener("dragover", (event) => { event.preventDefault(); at("drop").classList.add("over"); });
addEventListener("dragleave", (event) => { if (!event.relatedTarget) at("drop").classList.remove("over"); });
addEventListener("drop", (event) => {
  event.preventDefault();
  at("drop").classList.remove("over");
  take(event.dataTransfer.files);
});
addEventListener("paste", (event) => take(event.clipboardData.files));
