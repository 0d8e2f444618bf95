// Label: the grid of thumbnails in an order that saves work, the classes, and batches of sure suggestions.

import {get} from "./api.js";
import {signs} from "./chips.js";
import {classPanel} from "./classes.js";
import {button, empty, leadTo, make, noPhotos, onceAFrame, plural} from "./dom.js";
import {Grid} from "./grid.js";
import {labelOfKey, typing} from "./keys.js";
import {swatch} from "./palette.js";
import {allRows, bySuggestion, classNumbers, counts, howMany, label, labelled, LEFT_OUT, nameOf, NO_LABEL, NONE, on, say, store, suggestionOf, UNSURE} from "./store.js";
import {view} from "./viewer.js";

const ORDERS = [["worth", "most worth labelling"], ["suggested", "suggested class"], ["similar", "similar to the selected"],
  ["time", "time"], ["name", "name"]];
const names = new Intl.Collator("en", {numeric: true});

export function build(section) {
  const order = make("select", {"aria-label": "Order"}, ...ORDERS.map(([value, text]) => new Option(text, value)));
  const shown = make("select", {"aria-label": "Show"});
  const size = make("input", {type: "range", min: "84", max: "260", step: "8", value: "132", "aria-label": "Size of the thumbnails"});
  const anew = button("New order", () => { arrange({top: true}); grid.element.focus(); }, "quiet anew", {hidden: true});
  const number = make("span", {class: "soft"});
  const note = make("p", {class: "lead-in"});
  const nothing = make("div", {class: "nothing", hidden: true});
  const grid = new Grid({label: "Photos", decorate: signs, open: (row) => view(row, grid.rows), changed});
  const panel = classPanel({selected: () => grid.selected(), after: (rows) => { after = moveOn(rows); }, filter: (value) => filter(String(value))});
  const batches = make("section", {class: "batches", "aria-label": "Sure suggestions"});
  const work = make("div", {class: "label-work"},
    make("div", {class: "grid-side"},
      make("div", {class: "toolbar"}, make("label", {}, "Order ", order), make("label", {}, "Show ", shown), size, anew, number),
      note, make("div", {class: "grid-box"}, grid.element, nothing)),
    make("aside", {class: "side"}, panel.element, batches));
  const first = make("div");
  section.append(first, work);
  let similarTo = null, similar = null, ordered = -1;

  order.addEventListener("change", () => arrange({top: true}));
  shown.addEventListener("change", () => arrange({top: true}));
  size.addEventListener("input", () => grid.resize(Number(size.value)));

  // --- which photos, in which order ---

  function wanted(row) {
    const now = store.labels[row], value = shown.value;
    if (value === "todo") return now === NO_LABEL;
    if (value === "all") return now !== LEFT_OUT;
    if (value === "labelled") return now !== NO_LABEL && now !== LEFT_OUT;
    if (value === "unknown") return now === NO_LABEL && Boolean(suggestionOf(row)?.unknown);
    if (value.startsWith("batch")) return now === NO_LABEL && batchRows.has(row);
    return now === Number(value);
  }

  let batchRows = new Set();

  function sorted() {
    const rows = allRows(), {rank = new Map(), ready, suggested, probability} = store.suggestions;
    const by = (key) => rows.sort((a, b) => key(a) - key(b) || a - b);
    if (order.value === "worth") return by((row) => rank.get(row) ?? 1e9);
    if (order.value === "time") return by((row) => store.times[row]);
    if (order.value === "name") return rows.sort((a, b) => names.compare(store.ids[a], store.ids[b]));
    if (order.value === "suggested") {
      if (!ready) return rows;
      const place = new Map(classNumbers().map((each, i) => [each, i]));
      return by((row) => 1000 * (place.get(suggested[row]) ?? 1e6) - (probability[row] || 0));
    }
    return similar || rows;
  }

  async function arrange({top = false} = {}) {
    if (order.value === "similar") {
      const row = grid.cursor ?? similarTo;
      if (row === null || row === undefined) {
        say("Select a photo first: then the others are sorted by how much they look like it.");
        order.value = "worth";
      } else if (row !== similarTo || !similar) {
        try {
          similar = (await get(`/api/similar/${row}`)).rows.filter((each) => !store.refused.has(each));
          similarTo = row;
        } catch (error) {
          say(error.message, {bad: true});
          order.value = "worth";
        }
      }
    }
    ordered = store.suggestions.version;
    anew.hidden = true;
    batchRows = batchOf(shown.value);
    grid.show(sorted().filter(wanted), {top});
    tell();
  }

  function filter(value) {
    shown.value = value;
    if (shown.value !== value) shown.value = "all";
    arrange({top: true});
    grid.element.focus();
  }

  // --- labelling goes on to the next photo ---

  /** Choose the photo that comes next, before these rows get a label; what comes back goes there when they have it. */
  function moveOn(rows) {
    const going = new Set(rows);
    const from = Math.max(...rows.map((row) => grid.places.get(row) ?? -1));
    const next = grid.rows.slice(from + 1).find((row) => !going.has(row)) ?? grid.rows.findLast((row) => !going.has(row));
    const atTop = grid.top < grid.step;
    return () => {
      // With a new order, what is worth most now comes first; further down, nothing moves under the eyes.
      if (order.value === "worth" && shown.value === "todo" && ordered !== store.suggestions.version && atTop) {
        arrange();
        if (grid.rows.length) grid.select([grid.rows[0]]);
      } else {
        leave();
        if (next !== undefined && grid.places.has(next)) grid.select([next]);
      }
    };
  }

  let after = null;  // what to do when the labels that the panel gives are shown

  /** Take photos out that are no longer wanted, without sorting anew. */
  function leave() {
    const rows = grid.rows.filter(wanted);
    if (rows.length !== grid.rows.length) grid.show(rows);
  }

  function accept(rows) {
    const groups = bySuggestion(rows);
    if (!groups.size) {
      say(store.suggestions.ready ? "Nothing is suggested for the selection." : store.suggestions.reason || "No suggestions yet: label a photo of each of two classes first.");
      return;
    }
    const next = moveOn(rows);
    for (const [suggested, photos] of groups) label(photos, suggested);
    next();
  }

  // --- batches of sure suggestions ---

  const batchOf = (value) => value.startsWith("batch")
    ? new Set(store.suggestions.batches.find((each) => each.class === Number(value.slice(5)))?.rows || []) : new Set();

  function drawBatches() {
    const {ready, reason} = store.suggestions;
    const found = store.suggestions.batches.map((batch) => ({...batch, rows: batch.rows.filter((row) => store.labels[row] === NO_LABEL)}))
      .filter((batch) => batch.rows.length && store.classes[batch.class] !== null);
    batches.replaceChildren(make("h2", {text: "Sure suggestions"}));
    if (!ready) {
      batches.append(make("p", {class: "soft small", text: reason || store.state?.suggestions.reason || "Label a photo of each of two classes first: then each other photo gets a suggestion."}));
    } else if (!found.length) {
      batches.append(make("p", {class: "soft small", text: counts().get(NO_LABEL) ? "None now. They come as you label: go on with the first photos of the grid." : "None: every photo has a label."}));
    }
    const texts = new Set(found.map(({error}) => error?.text || ""));
    const told = (error) => make("p", {class: "soft small", text: error ? error.text : "Cannot tell yet how often such a suggestion is wrong: look at them first."});
    if (found.length && texts.size === 1) batches.append(told(found[0].error));  // the same for all: said once
    for (const {class: each, rows, least, error} of found) {
      batches.append(make("div", {class: "batch"},
        make("p", {}, swatch(each), make("strong", {text: nameOf(each)}), ` ${rows.length.toLocaleString("en")} above ${least}\u00a0%`),
        texts.size > 1 ? told(error) : null,
        make("div", {class: "row"},
          button(`Accept all ${rows.length.toLocaleString("en")}`, () => {
            const next = moveOn(grid.selected().length ? grid.selected() : rows);
            label(rows, each, "batch");
            next();
          }, error ? "primary" : "", {"aria-label": `Accept all ${rows.length} suggestions of ${nameOf(each)} above ${least} %`}),
          button("Look first", () => filter(`batch${each}`), "", {"aria-label": `Look first at the ${rows.length} suggestions of ${nameOf(each)}`}))));
    }
  }

  // --- what is said around the grid ---

  function drawFilter() {
    const found = counts(), before = shown.value || "todo", total = howMany();
    const unknown = store.suggestions.unknown.reduce((n, yes, row) => n + (yes && store.labels[row] === NO_LABEL), 0);
    const option = (value, text, n) => new Option(`${text} (${n.toLocaleString("en")})`, value);
    const out = found.get(LEFT_OUT) || 0, todo = found.get(NO_LABEL) || 0;
    const options = [option("todo", "to label", todo), option("all", "all", total - out), option("labelled", "labelled", total - out - todo)];
    if (unknown) options.push(option("unknown", "unlike the labelled", unknown));
    for (const {class: each, rows} of store.suggestions.batches) {
      const n = rows.filter((row) => store.labels[row] === NO_LABEL).length;
      if (n || before === `batch${each}`) options.push(option(`batch${each}`, `sure: ${nameOf(each)}`, n));
    }
    for (const each of [...classNumbers(), NONE, UNSURE, LEFT_OUT]) {
      if (found.get(each) || before === String(each)) options.push(option(String(each), nameOf(each), found.get(each) || 0));
    }
    shown.replaceChildren(...options);
    shown.value = before;
    if (!shown.value) shown.value = "todo";
  }

  function tell() {
    const n = grid.selection.size;
    number.textContent = n ? `${n.toLocaleString("en")} of ${plural(grid.rows.length)} selected` : plural(grid.rows.length);
    const classes = classNumbers().filter((each) => counts().get(each)).length;
    note.textContent = labelled() === 0 ? "Start here: click a photo, type what it shows, and press Enter."
      : classes < 2 ? "Now a photo of another class: select it, type its name, press Enter. Then suggestions begin."
        : "";
    note.hidden = !note.textContent;
    nothing.hidden = grid.rows.length > 0;
    if (!grid.rows.length) {
      nothing.replaceChildren(shown.value === "todo" && howMany()
        ? empty("All photos are labelled", "See how good the classifier is now, or take it along.", leadTo("quality", "How good?"))
        : empty("No photo here", "No photo fits what is to be shown.", button("Show those to label", () => filter("todo"))));
    }
  }

  function changed() {
    tell();
    panel.tell();
  }

  function hasPhotos() {
    const photos = store.state?.open && store.ids.length;
    work.hidden = !photos;
    first.replaceChildren(...(photos ? [] : [noPhotos()]));
    return photos;
  }

  const around = onceAFrame(() => {
    if (section.hidden) return;
    drawFilter();
    drawBatches();
    tell();
  });

  // --- keys ---

  document.addEventListener("keydown", (event) => {
    if (section.hidden || work.hidden || typing(event)) return;
    const {key, ctrlKey, metaKey, altKey} = event;
    if (ctrlKey || metaKey || altKey) return;
    const inButton = event.target.closest("button, a, summary");
    const named = labelOfKey(event);
    if (named !== null) panel.give(named);
    else if (key === "Enter" && !inButton) accept(grid.selected());
    else if (key === "o") {
      if (grid.cursor !== null) view(grid.cursor, grid.rows);
    } else if (key === "/") panel.type(grid.element);
    else if (/^(Arrow|Page|Home|End)/.test(key) && !grid.element.contains(event.target)) {
      grid.element.focus();  // the arrows always move among the photos
      grid.press(event);
    }
    else if (/^\p{L}$/u.test(key) && key !== "u") {
      panel.type(grid.element);  // the letter goes into the field, which has the focus now
      return;
    } else return;
    event.preventDefault();
  });

  // After a click on a class the keys are the grid's again; whoever came by Tab stays where he is.
  panel.element.addEventListener("click", (event) => {
    if (event.detail && event.target.closest(".class-line")) grid.element.focus({preventScroll: true});
  });

  // --- what happens ---

  on("labels", (rows) => {
    const next = after;
    after = null;
    grid.refresh(rows);
    around();
    if (next) next();
    else if (!section.hidden && ordered !== -1) leaveOrReturn(rows);
  });

  /** Labels that came from elsewhere, or back by undo: photos leave the queue, or come back to their place. */
  function leaveOrReturn(rows) {
    if (rows.some((row) => wanted(row) && !grid.places.has(row) && !store.refused.has(row))) {
      const selected = rows.filter(wanted);
      arrange();
      if (selected.length && selected.length < 1000) grid.select(selected);
    } else leave();
  }

  on("suggestions", () => {
    if (section.hidden) return;
    around();
    grid.refresh();
    if (!grid.selection.size && grid.top === 0 && ["worth", "suggested"].includes(order.value)) arrange();
    else anew.hidden = !["worth", "suggested"].includes(order.value) || ordered === store.suggestions.version;
  });

  on("opened", () => {
    similar = similarTo = null;
    shown.replaceChildren();
    order.value = "worth";
  });
  on("photos loaded", () => {
    if (section.hidden || !hasPhotos()) return;
    drawFilter();
    arrange();
    grid.refresh();
  });

  return {
    show() {
      if (!hasPhotos()) return;
      drawFilter();
      drawBatches();
      arrange();
      grid.refresh();  // labels and suggestions that came while it was out of sight
      if (document.activeElement === document.body || document.activeElement.closest("[hidden]")) grid.element.focus();
    },
  };
}
