// Photos: choose a folder, watch it being read, see what was refused, keep one of each set of copies.

import {post, send} from "./api.js";
import {button, duration, make, plural} from "./dom.js";
import {Grid} from "./grid.js";
import {allRows, howMany, label, LEFT_OUT, load, on, read, say, store, takeFolderClasses, thumb} from "./store.js";
import {signs} from "./chips.js";
import {view} from "./viewer.js";

const KINDS = {equal: "The same picture", near: "Nearly the same picture", burst: "Taken one after another"};
const AT_ONCE = 20;

export function build(section) {
  const chooser = make("div", {class: "chooser"}), open = make("div", {class: "opened"});
  section.append(chooser, open);
  let choosing = false;

  // --- choosing a folder ---

  const path = make("input", {type: "text", "aria-label": "Path of the folder", placeholder: "/home/me/photos/bees", autocomplete: "off", spellcheck: "false"});
  const back = button("Back", () => { choosing = false; show(); }, "quiet");
  const folders = make("ul", {class: "folders"}), crumb = make("p", {class: "soft crumb"}), wrong = make("p", {class: "bad", role: "alert"});
  const openThis = make("button", {class: "primary", text: "Open this folder"});
  chooser.append(
    make("h2", {text: "Which photos?"}),
    make("p", {text: "Choose the folder with your photos, or type the path of a list of them (.csv). They stay where they are, on this machine; nothing is changed in the folder."}),
    make("form", {class: "row", on: {submit: (event) => { event.preventDefault(); openFolder(path.value.trim()); }}}, path, openThis),
    wrong, crumb, folders, make("p", {class: "soft small", text: "You can also drop photos or a whole folder anywhere on this page."}), back);

  async function browse(to = "") {
    const answer = await read(`/api/folders?path=${encodeURIComponent(to)}`);
    if (!answer) return;
    path.value = answer.path;
    openThis.disabled = false;
    crumb.textContent = answer.images ? `${plural(answer.images)} in this folder itself.` : "No photo lies directly in this folder; folders inside it are read, too.";
    const line = (there) => make("li", {}, button("", () => browse(there), "folder"));
    const lines = answer.folders.map(({name, path: there, images, begun}) => {
      const item = line(there);
      item.firstChild.append(make("span", {class: "folder-name", text: name}),
        make("span", {class: "soft", text: `${begun ? "begun · " : ""}${images === null ? "" : images ? plural(images) : "none directly in it"}`}));
      return item;
    });
    if (answer.parent !== null) {
      const up = line(answer.parent);
      up.firstChild.append(make("span", {class: "folder-name", text: "↑ Folder above"}));
      lines.unshift(up);
    }
    folders.replaceChildren(...lines);
    if (!lines.length) folders.append(make("li", {class: "soft", text: "No folders in here."}));
  }

  path.addEventListener("keydown", (event) => { if (event.key === "Escape") path.blur(); });

  async function openFolder(chosen, made = false) {
    if (!chosen) return false;
    wrong.textContent = "";
    openThis.disabled = true;
    openThis.textContent = "Opening …";
    try {
      await post("/api/open", made ? {path: chosen, make: true} : {path: chosen});
      choosing = false;
      await load();
      show();
      return true;
    } catch (error) {
      wrong.textContent = error.message;
      return false;
    } finally {
      openThis.disabled = false;
      openThis.textContent = "Open this folder";
    }
  }

  // --- an open folder ---

  const bar = make("progress", {max: "1", value: "0", "aria-label": "Photos read"}), doing = make("p", {class: "doing"});
  const control = button("Stop", () => turn()), meter = make("div", {class: "row"}, bar, control);
  const forward = make("a", {class: "button primary", href: "#label", text: "Start labelling"});
  const where = make("p", {class: "soft crumb"});
  const ask = make("div", {class: "ask", hidden: true});
  const refused = make("details", {class: "refused"}), copies = make("section", {class: "copies", "aria-label": "Copies"});
  const grid = new Grid({label: "All photos", size: 96, open: (row) => view(row, allRows()),
    decorate: (row) => store.embedded[row] ? signs(row) : {text: `${store.ids[row]}, not read yet`},
    pending: (row) => !store.embedded[row]});
  open.append(
    make("div", {class: "opened-head"}, make("div", {}, make("h2", {text: "Photos"}), where),
      make("div", {class: "row"}, button("Another folder", () => { choosing = true; show(); }, "quiet"), forward)),
    make("div", {class: "card progress-card"}, doing, meter),
    ask, copies, refused, make("div", {class: "grid-box tall"}, grid.element));

  async function turn() {
    const {status} = store.state.embedding;
    control.disabled = true;
    try {
      store.state.embedding = await post("/api/embedding", {op: status === "running" || status === "listing" ? "stop" : "start"});
    } catch (error) {
      say(error.message, {bad: true});
    }
    control.disabled = false;
    tell();
  }

  function tell() {
    const {state} = store;
    if (!state || !state.open) return;
    const {status, done, total, seconds_left: left, message} = state.embedding;
    where.textContent = state.folder;
    meter.hidden = status === "done";
    if (status === "listing" || status === "waiting") bar.removeAttribute("value");
    else bar.value = total ? done / total : 0;
    const n = howMany();
    doing.textContent = {
      waiting: "Waiting to begin …", listing: "Looking for photos …",
      running: `Reading photos: ${done.toLocaleString("en")} of ${total.toLocaleString("en")}${left === null ? "" : `, about ${duration(left)} left`}. You can start labelling meanwhile.`,
      stopped: `Stopped at ${done.toLocaleString("en")} of ${total.toLocaleString("en")}. It goes on where it was.`,
      done: n ? `${plural(n)} read. ${state.labelled ? "Go on labelling, or see how good the classifier is." : "Next: say what a few of them show."}` : "There is no photo in this folder that can be read.",
      failed: `It did not work: ${message}`,
    }[status];
    doing.classList.toggle("bad", status === "failed");
    control.hidden = status === "done" || status === "waiting";
    control.textContent = {running: "Stop", listing: "Stop", stopped: "Go on", failed: "Try again"}[status] || "";
    forward.classList.toggle("off", !n);
    forward.textContent = state.labelled ? "Go on labelling" : "Start labelling";
    ask.hidden = !state.folder_classes;
    if (state.folder_classes && !ask.firstChild) {
      const names = Object.entries(state.folder_names).map(([name, n]) => `${name} (${n.toLocaleString("en")})`), more = state.folder_classes - names.length;
      const listed = `${names.join(", ")}${more ? ` and ${more.toLocaleString("en")} more` : ""}`;
      ask.append(make("p", {text: state.list
        ? `The list has labels: ${listed}. Take them?`
        : `The photos lie in ${plural(state.folder_classes, "folder")}: ${listed}. Do these names say what the photos show?`}),
        make("div", {class: "row"}, button("Yes, take them as labels", () => decide(true), "primary"),
          button("No, I label them myself", () => decide(false))));
    }
    if (state.embedding.refused && state.embedding.refused !== listed) listRefused(state.embedding.refused);
    refused.hidden = !state.embedding.refused;
  }

  async function decide(take) {
    for (const each of ask.querySelectorAll("button")) each.disabled = true;
    await takeFolderClasses(take);
    ask.replaceChildren();
    tell();
  }

  let listed = 0;

  async function listRefused(n) {
    listed = n;
    const answer = await read("/api/refused");
    if (!answer) return;
    refused.replaceChildren(make("summary", {text: `${plural(answer.refused.length, "file")} could not be used`}),
      make("ul", {class: "plain"}, ...answer.refused.map(({id, message}) => make("li", {}, make("strong", {text: id}), ` ${message}`))));
  }

  // --- copies: keep one ---

  let groups = [];

  async function findCopies() {
    const answer = await read("/api/duplicates");
    if (!answer) return;
    groups = answer.ready ? answer.groups : [];
    drawCopies();
  }

  function drawCopies() {
    const left = groups.map((group) => ({...group, rows: group.rows.filter((row) => store.labels[row] !== LEFT_OUT)})).filter(({rows}) => rows.length > 1);
    const focused = copies.contains(document.activeElement);
    copies.hidden = !groups.length;
    if (!groups.length) return;
    copies.replaceChildren(make("h3", {text: left.length ? `${plural(left.length, "set")} of copies: keep one of each?` : "No copies left"}));
    if (!left.length) return;
    copies.append(make("p", {class: "soft", text: "Copies make a classifier look better than it is. The others are left out, not deleted."}),
      ...left.slice(0, AT_ONCE).map(({rows, kind}) => make("div", {class: "card copy"},
        make("p", {class: "small", text: KINDS[kind]}),
        make("div", {class: "copy-row"}, ...rows.slice(0, 12).map((row) => make("figure", {},
          make("img", {src: thumb(row), alt: store.ids[row], loading: "lazy"}),
          make("figcaption", {class: "small soft", title: store.ids[row], text: store.ids[row].split("/").slice(-2).join("/ ")}),
          button("Keep this one", () => keep(rows, row), "", {"aria-label": `Keep this one: ${store.ids[row]}; the others are left out`})))),
        button("Keep all", () => { groups = groups.filter((group) => !rows.every((row) => group.rows.includes(row))); drawCopies(); }, "quiet"))));
    if (left.length > 1) {
      copies.append(button(`Keep the first of each of the ${left.length}`, () => label(left.flatMap(({rows}) => rows.slice(1)), LEFT_OUT, "copies")));
    }
    if (left.length > AT_ONCE) copies.append(make("p", {class: "soft", text: `and ${plural(left.length - AT_ONCE, "more set")}.`}));
    if (focused) copies.querySelector("button").focus();
  }

  const keep = (rows, kept) => label(rows.filter((row) => row !== kept), LEFT_OUT, "copies");

  // --- dropped photos and folders ---

  section.addEventListener("dragover", (event) => { event.preventDefault(); section.classList.add("over"); });
  section.addEventListener("dragleave", (event) => { if (!section.contains(event.relatedTarget)) section.classList.remove("over"); });
  section.addEventListener("drop", async (event) => {
    event.preventDefault();
    event.stopPropagation();
    section.classList.remove("over");
    const entries = [...event.dataTransfer.items].map((item) => item.webkitGetAsEntry?.()).filter(Boolean);
    const files = entries.length ? await filesOf(entries) : [...event.dataTransfer.files];
    take(files, entries.length === 1 && entries[0].isDirectory ? entries[0].name : "dropped photos");
  });

  async function take(files, name) {
    if (!files.length) return;
    if (!store.state.open && !await openFolder(`${path.value.replace(/\/$/, "")}/${name}`, true)) return;
    let sent = 0;
    const failed = [];
    for (const file of files) {
      doing.textContent = `Adding photo ${sent + 1} of ${files.length} …`;
      try {
        await send(`/api/drop?name=${encodeURIComponent(file.name)}`, file);
        sent++;
      } catch (error) {
        failed.push(`${file.name}: ${error.message}`);
      }
    }
    say(`${plural(sent)} added.${failed.length ? ` ${failed.length} not: ${failed[0]}` : ""}`, {bad: failed.length > 0});
    tell();
  }

  // --- what happens ---

  function show() {
    const opened = Boolean(store.state && store.state.open) && !choosing;
    chooser.hidden = opened;
    open.hidden = !opened;
    if (!opened) {
      back.hidden = !choosing;
      back.textContent = `Back to ${store.state?.name}`;
      if (!folders.firstChild) browse();
      return;
    }
    tell();
    grid.show(allRows());
    grid.refresh();
    if (store.state.embedding.status === "done") findCopies();
  }

  let last = "";
  on("state", () => {
    if (section.hidden) return;
    tell();
    const status = store.state.embedding?.status ?? "";  // no folder is open yet
    if (status !== last && status === "done") findCopies();
    last = status;
  });
  on("photos loaded", () => {
    if (section.hidden) return;
    show();
  });
  on("opened", () => {
    groups = [];
    listed = 0;
    ask.replaceChildren();
    drawCopies();
  });
  on("labels", (rows) => {
    if (section.hidden) return;
    grid.refresh(rows);
    drawCopies();
  });

  return {show};
}

/** All files in dropped folders, whose entries come in portions. */
async function filesOf(entries) {
  const found = [];
  for (const entry of entries) {
    if (entry.isFile) found.push(await new Promise((done, failed) => entry.file(done, failed)));
    else {
      const reader = entry.createReader();
      for (let portion; (portion = await new Promise((done, failed) => reader.readEntries(done, failed))).length;) found.push(...await filesOf(portion));
    }
  }
  return found;
}
