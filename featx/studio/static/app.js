// The shell: steps, one view at a time by the hash of the address, messages, and the keys that work everywhere.

import {button, make, percent, plural} from "./dom.js";
import {help, typing} from "./keys.js";
import {howMany, labelled, listen, load, on, store, turn} from "./store.js";

const STEPS = [
  ["photos", "Photos"], ["label", "Label"], ["map", "Map"], ["quality", "How good?"], ["try", "Try"], ["take", "Take it along"],
];
const views = new Map();  // name -> {section, view}
const at = (id) => document.getElementById(id);

// --- the steps, with how far they are ---

function progress(name) {
  const {state, quality} = store;
  if (!state || !state.open) return "";
  if (name === "photos") return ["done", "failed"].includes(state.embedding.status) ? plural(howMany())
    : `${state.embedding.done} of ${state.embedding.total}`;
  if (name === "label") return `${labelled()} labelled`;
  if (name === "quality") return quality && quality.accuracy ? percent(quality.accuracy.mean) : "";
  if (name === "take") {
    const made = state.jobs.filter((job) => job.status === "done").length;
    return made ? plural(made, "file") : "";
  }
  return "";
}

function steps() {
  const current = here();
  at("project").textContent = store.state && store.state.open ? store.state.name : "featx studio";
  document.title = `${STEPS.find(([name]) => name === current)[1]} · ${at("project").textContent}`;
  const links = at("steps").children;
  STEPS.forEach(([name], i) => {
    links[i].toggleAttribute("aria-current", false);
    if (name === current) links[i].setAttribute("aria-current", "step");
    links[i].lastChild.textContent = progress(name);
  });
  for (const which of ["undo", "redo"]) {
    const what = store.state && store.state[which];
    at(which).disabled = !what;
    at(which).title = what || "";
  }
}

function here() {
  const name = location.hash.slice(1);
  return STEPS.some(([each]) => each === name) ? name : "photos";
}

async function go() {
  const name = here();
  if (!views.has(name)) {
    const section = make("section", {class: `view ${name}`, "aria-label": STEPS.find(([each]) => each === name)[1]});
    at("main").append(section);
    views.set(name, {section, view: null});
    const {build} = await import(`./${name}.js`);
    views.get(name).view = build(section);
  }
  if (name !== here()) return;
  at("steps").querySelector(`[href="#${name}"]`).scrollIntoView({block: "nearest", inline: "nearest"});
  for (const [each, {section}] of views) section.hidden = each !== name;
  steps();
  views.get(name).view?.show();
}

function step(by) {
  const place = STEPS.findIndex(([name]) => name === here());
  location.hash = STEPS[Math.min(STEPS.length - 1, Math.max(0, place + by))][0];
}

// --- messages ---

let hush = 0;

function said({text, bad, undo}) {
  clearTimeout(hush);
  at("said").className = bad ? "said shown bad" : "said shown";
  at("said").replaceChildren(make("span", {text}), ...(undo ? [button("Undo", () => turn("undo"), "quiet")] : []));
  hush = setTimeout(() => at("said").classList.remove("shown"), bad ? 12000 : 5000);
}

function trouble() {
  at("trouble").hidden = !store.trouble;
  at("trouble").textContent = store.trouble;
}

// --- keys that work everywhere ---

document.addEventListener("keydown", (event) => {
  const {key, ctrlKey, metaKey, shiftKey, altKey} = event;
  const field = event.target.closest("input:not([type=checkbox]):not([type=range]), textarea");
  if ((ctrlKey || metaKey) && !altKey && "zZyY".includes(key)) {
    if (field && field.value) return;  // the field has its own undo
    turn(key === "y" || key === "Y" || shiftKey ? "redo" : "undo");
  } else if (ctrlKey || metaKey || altKey || typing(event)) {
    return;
  } else if (key === "?") help();
  else if (key === "u") turn("undo");
  else if (key === "[") step(-1);
  else if (key === "]") step(1);
  else return;
  event.preventDefault();
});

// Photos that are dropped beside a place made for them must not replace the page.
for (const name of ["dragover", "drop"]) document.addEventListener(name, (event) => event.preventDefault());

at("steps").append(...STEPS.map(([name, title]) => make("a", {href: `#${name}`}, make("span", {text: title}), make("small"))));
at("undo").addEventListener("click", () => turn("undo"));
at("redo").addEventListener("click", () => turn("redo"));
at("keys").addEventListener("click", help);
on("said", said);
on("trouble", trouble);
let asked = 0;
on("state labels photos quality jobs loaded", () => {  // many come at once: once a frame is enough
  asked ||= requestAnimationFrame(() => { asked = 0; steps(); });
});
addEventListener("hashchange", go);

await load();
await go();
listen();
