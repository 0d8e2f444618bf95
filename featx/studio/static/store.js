// What the page knows: photos, labels, suggestions. Labels are shown at once, sent in order, and taken back when refused.

import {get, post, Gone, Refused} from "./api.js";
import {plural} from "./dom.js";

export const NO_LABEL = -1, NONE = -2, UNSURE = -3, LEFT_OUT = -4;
const ASIDE = {[NO_LABEL]: "no label", [NONE]: "none of these", [UNSURE]: "unsure", [LEFT_OUT]: "left out"};

const NOTHING_SUGGESTED = {version: -1, ready: false, suggested: [], probability: [], unknown: [], worth: [], batches: []};

export const store = {
  state: null,  // the answer of /api/state, kept up to date by the events
  ids: [], times: [], splits: [], embedded: [], refused: new Set(),
  classes: [], labels: [],  // as shown: what the server has, and what is on its way to it
  suggestions: NOTHING_SUGGESTED,
  quality: null,
  trouble: "",
};
const server = {seq: -1, classes: [], labels: []};
let waiting = [];  // actions on their way; those with `seq` are taken, and wait for their event
let working = false;

// --- who wants to know ---

const listeners = new Map();

export function on(names, listener) {
  for (const name of names.split(" ")) listeners.set(name, [...(listeners.get(name) || []), listener]);
}

function emit(name, detail) {
  for (const listener of listeners.get(name) || []) listener(detail);
}

/** Tell the user what was done or went wrong; `bad` stays longer. */
export const say = (text, {bad = false, undo = false} = {}) => emit("said", {text, bad, undo});

function trouble(text) {
  if (store.trouble === text) return;
  store.trouble = text;
  emit("trouble");
}

// --- reading ---

export const nameOf = (label) => label >= 0 ? store.classes[label] ?? "a removed class" : ASIDE[label];

/** Numbers of the classes that were not removed. */
export const classNumbers = () => store.classes.flatMap((name, number) => name === null ? [] : [number]);

let counted = null, listed = null;  // kept until labels or photos change: views ask often

/** How many photos have each label, by label. */
export function counts() {
  if (counted) return counted;
  counted = new Map();
  for (const row of rowsShown()) counted.set(store.labels[row], (counted.get(store.labels[row]) || 0) + 1);
  return counted;
}

function rowsShown() {
  listed ||= store.ids.flatMap((_, row) => store.refused.has(row) ? [] : [row]);
  return listed;
}

/** Photos that can be shown, in their order. */
export const allRows = () => [...rowsShown()];

export const howMany = () => rowsShown().length;

/** Photos that are not left out. */
const staying = () => howMany() - (counts().get(LEFT_OUT) || 0);

export const labelled = () => staying() - (counts().get(NO_LABEL) || 0);

export const suggestionOf = (row) => {
  const {ready, suggested, probability, unknown} = store.suggestions;
  const label = ready ? suggested[row] ?? -1 : -1;
  return label === -1 || store.classes[label] === null ? null : {label, percent: probability[row], unknown: Boolean(unknown[row])};
};

/** Photos by what is suggested for them: a map from the number of a class to rows. */
export function bySuggestion(rows) {
  const found = new Map();
  for (const row of rows) {
    const suggested = suggestionOf(row);
    if (suggested) found.set(suggested.label, [...(found.get(suggested.label) || []), row]);
  }
  return found;
}

// The browser keeps pictures by their addresses, but rows are other photos in another folder, or next year: so the address
// says which photo is meant, by a hash (FNV-1a) of its name, its time and its project.
let stamps = [];

function stamp(row) {
  if (stamps[row]) return stamps[row];
  let hash = 0x811c9dc5;
  for (const letter of `${store.state?.project} ${store.ids[row]} ${store.times[row]}`) {
    hash = Math.imul(hash ^ letter.codePointAt(0), 0x01000193);
  }
  return (stamps[row] = (hash >>> 0).toString(36));
}

export const thumb = (row) => `/thumb/${row}?${stamp(row)}`;
export const photo = (row) => `/photo/${row}?${stamp(row)}`;

// --- labels: what the server has, overlaid by what is on its way ---

function overlay(rows) {
  const actions = waiting.filter((each) => each.rows);
  store.classes = [...server.classes];
  for (const {name} of actions) if (name && !store.classes.includes(name)) store.classes.push(name);
  for (const row of rows) store.labels[row] = server.labels[row] ?? NO_LABEL;
  for (const {rows: changed, name, label} of actions) {
    const shown = name ? store.classes.indexOf(name) : label;
    for (const row of changed) store.labels[row] = shown;
  }
  counted = null;
  emit("labels", rows);
}

function taken(event) {
  if (event.seq <= server.seq) return;
  if (event.seq > server.seq + 1) {
    loadLabels();
    return;
  }
  server.seq = event.seq;
  server.classes = event.classes;
  event.rows.forEach((row, i) => { server.labels[row] = event.labels[i]; });
  known(event);
  waiting = waiting.filter((each) => !(each.seq <= server.seq));
  overlay(event.rows);
}

function known({undo, redo, labelled: number, begun}) {
  if (!store.state) return;
  const turned = store.state.begun !== begun;
  Object.assign(store.state, {undo, redo, labelled: number, begun});
  emit("state");
  if (turned) loadState();  // whether to ask for the names of folders
}

async function loadLabels() {
  const answer = await read("/api/labels");
  if (!answer || answer.seq < server.seq) return;
  Object.assign(server, answer);
  waiting = waiting.filter((each) => !(each.seq <= server.seq));
  store.labels.length = Math.max(answer.labels.length, store.ids.length);
  overlay([...store.labels.keys()]);
}

const pause = (ms) => new Promise((done) => setTimeout(done, ms));

async function work() {
  if (working) return;
  working = true;
  for (let action; (action = waiting.find((each) => each.seq === undefined));) {
    try {
      const {path, body, rows, name, label, from} = action;
      const answer = await post(path, body || (name ? {rows, name, from} : {rows, label, from}));
      action.seq = answer.seq;
      if (!action.rows || answer.seq <= server.seq) waiting = waiting.filter((each) => each !== action);
      action.done(answer);
      // The event that confirms it comes by itself; should it be lost, ask.
      setTimeout(() => { if (waiting.includes(action)) loadLabels(); }, 2000);
    } catch (error) {
      if ((error instanceof Gone && !ended()) || (error.reason === "no_folder_open" && store.state.open)) {  // loadState opens it again
        trouble("The connection to featx studio is lost. Your labels are kept here and sent as soon as it is back.");
        await pause(1000);
        continue;
      }
      signedOut(error);
      waiting = waiting.filter((each) => each !== action);
      if (action.rows) overlay(action.rows);
      action.failed(error);
    }
    if (store.trouble.startsWith("The connection")) trouble("");
  }
  working = false;
}

function enqueue(action) {
  return new Promise((done, failed) => {
    waiting.push({...action, done, failed});
    if (action.rows) overlay(action.rows);
    work();
  });
}

/** Give photos a label: a number, or the name of a class, which is made if it is new. Shown at once. */
export async function label(rows, what, from = "key") {
  if (!rows.length) {
    say("Select photos first: click one, or move with the arrow keys.");
    return;
  }
  let name = typeof what === "string" ? what.trim() : null;
  if (name === "") return;
  if (name === null && what >= server.classes.length) name = store.classes[what];  // a class that is still on its way
  const sent = enqueue({path: "/api/label", rows: [...rows], name, label: name ? undefined : what, from});
  say(`${plural(rows.length)}: ${name || nameOf(what)}. ${labelled()} of ${staying()} labelled.`, {undo: true});
  try {
    await sent;
  } catch (error) {
    say(`${plural(rows.length)} not labelled: ${error.message}`, {bad: true});
  }
}

/** Add, rename, merge or remove a class: {op, class, name, into}. Throws what the server refuses. */
export const changeClass = (body) => enqueue({path: "/api/classes", body});

export async function turn(which) {
  try {
    const {done} = await enqueue({path: `/api/${which}`, body: {}});
    say(`${which === "undo" ? "Undone" : "Done again"}: ${done}.`);
  } catch (error) {
    say(error.message, {bad: error.reason !== "nothing"});
  }
}

export async function takeFolderClasses(take) {
  try {
    await enqueue({path: "/api/folder-classes", body: {take}});
    await loadState();
  } catch (error) {
    say(error.message, {bad: true});
  }
}

// --- loading, and staying in step ---

function signedOut(error) {
  if (error instanceof Refused && error.status === 401) {
    trouble("This window is not signed in: open the address that featx studio printed.");
  }
}

/** Read, or say what is wrong and give null. */
export async function read(path) {
  try {
    return await get(path);
  } catch (error) {
    if (error instanceof Gone) trouble("The connection to featx studio is lost. This page goes on as soon as it is back.");
    else if (error.status === 401) signedOut(error);
    else say(error.message, {bad: true});
    return null;
  }
}

// An answer may be older than an event that overtook it: of what the page heard while it asked, it keeps what it heard.
const heard = new Map();  // what of the state events told, and which of all events it was
let told = 0;

function hearState(name, data) {
  heard.set(name, ++told);
  store.state[name] = data;
}

async function loadState() {
  const before = told;
  let answer = await read("/api/state");
  if (!answer) return null;
  if (!answer.open && store.state?.open) {  // the server was started anew, without a folder: go on with the one of before
    try {
      answer = await post("/api/open", {path: store.state.source});
    } catch (error) {
      say(error.message, {bad: true});
      return null;
    }
  }
  const other = Boolean(store.state) && store.state.project !== answer.project;
  if (!store.state || other) server.seq = -1;
  else for (const [name, at] of heard) if (at > before) answer[name] = store.state[name];
  store.state = answer;
  if (other) {
    Object.assign(store, {labels: [], quality: null, suggestions: NOTHING_SUGGESTED});
    emit("opened");
  }
  emit("state");
  return answer;
}

let photosAgain = false, photosAsked = false;

async function loadPhotos() {
  if (photosAsked) {
    photosAgain = true;
    return;
  }
  photosAsked = true;
  const answer = await read("/api/photos");
  if (answer) {
    Object.assign(store, {ids: answer.ids, times: answer.times, splits: answer.splits, embedded: answer.embedded, refused: new Set(answer.refused)});
    while (store.labels.length < store.ids.length) store.labels.push(server.labels[store.labels.length] ?? NO_LABEL);
    counted = listed = null;
    stamps = [];
    emit("photos");
  }
  setTimeout(() => {  // while a folder is embedded, the server speaks of new photos all the time
    photosAsked = false;
    if (photosAgain) loadPhotos();
    photosAgain = false;
  }, 1000);
}

async function loadSuggestions() {
  const answer = await read("/api/suggestions");
  if (!answer || answer.version < store.suggestions.version) return;
  const rank = new Map(answer.worth.map((row, i) => [row, i]));
  store.suggestions = {...answer, rank};
  emit("suggestions");
}

async function loadQuality() {
  const answer = await read("/api/quality");
  if (!answer) return;
  store.quality = answer;
  emit("quality");
}

/** Everything anew: at the start, after a lost connection, after another folder was opened. */
export async function load() {
  const state = await loadState();
  if (!state) return false;
  if (state.open) {
    store.suggestions = {...store.suggestions, version: -1};  // a server that was started anew counts anew
    await Promise.all([loadPhotos(), loadLabels(), loadSuggestions(), loadQuality()]);
  }
  if (!store.trouble.startsWith("This window")) trouble("");
  emit("loaded");
  return true;
}

const ENDED = "featx studio was ended";
const ended = () => store.trouble.startsWith(ENDED);  // then nothing comes back at this address

export function listen() {
  const events = new EventSource("/api/events");
  let lost = false, first = true;
  const hear = (name, listener) => events.addEventListener(name, (event) => listener(JSON.parse(event.data)));
  hear("labels", taken);
  hear("embedding", (data) => { hearState("embedding", data); emit("state"); });
  hear("photos", loadPhotos);
  hear("suggestions", (data) => { hearState("suggestions", data); emit("state"); loadSuggestions(); });
  hear("map", (data) => { hearState("map", data); emit("map"); });
  hear("quality", (data) => {
    hearState("quality", data);
    emit("state");
    if (data.status === "running") emit("quality");
    else loadQuality();
  });
  hear("problem", ({what, message}) => say(`${what}: ${message}`, {bad: true}));
  hear("job", (data) => {
    hearState("jobs", [...store.state.jobs.filter((each) => each.id !== data.id), data]);
    emit("jobs");
  });
  hear("closed", () => trouble(`${ENDED}. Start it again with the same command, and open the address that it prints.`));
  events.addEventListener("open", async () => {
    const before = JSON.stringify(store.state), again = lost || (first && JSON.stringify(await loadState()) !== before);
    lost = first = false;
    if (again) load();  // what happened before this window listened
  });
  events.addEventListener("error", async () => {
    lost = true;
    if (!store.trouble) await read("/api/state");  // says whether the connection is lost, or this window signed out
    if (events.readyState === EventSource.CLOSED) retry();
  });
}

/** Ask until the server is back. */
async function retry() {
  await pause(2000);
  if (await load()) listen();
  else if (!store.trouble.startsWith("This window")) retry();
}
