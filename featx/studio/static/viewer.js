// One photo, whole: what it is called, its label, and what is suggested. Arrows go on; the keys of Label work here, too.

import {photo} from "./api.js";
import {chip, suggestionChip} from "./chips.js";
import {dialog, make} from "./dom.js";
import {labelOfKey} from "./keys.js";
import {label, NO_LABEL, on, store, suggestionOf, turn} from "./store.js";

let open = null;

/** Show the photo of a row; the arrows go through `rows`. */
export function view(row, rows = [row]) {
  const image = make("img", {alt: ""});
  const told = make("div", {class: "viewer-told"});
  const place = make("span", {class: "soft"});
  const box = dialog("Photo", image, told, make("p", {class: "soft viewer-hint"}, place,
    " Arrow keys: next photo. 1 to 9: label it. Escape: back."));
  box.classList.add("viewer");
  open = {row, draw};

  function draw() {
    const name = store.ids[open.row];
    box.querySelector("h2").textContent = name;
    if (!image.src.endsWith(photo(open.row))) image.src = photo(open.row);
    image.alt = name;
    const suggested = suggestionOf(open.row);
    told.replaceChildren(...[
      chip(store.labels[open.row]),
      suggested && store.labels[open.row] === NO_LABEL ? suggestionChip(suggested) : null,
    ].filter(Boolean));
    place.textContent = rows.length > 1 ? `${rows.indexOf(open.row) + 1} of ${rows.length}.` : "";
  }

  function go(by) {
    const next = rows[rows.indexOf(open.row) + by];
    if (next === undefined) return;
    open.row = next;
    draw();
  }

  box.addEventListener("keydown", (event) => {
    const named = labelOfKey(event);
    if (event.key === "ArrowRight" || event.key === "ArrowDown") go(1);
    else if (event.key === "ArrowLeft" || event.key === "ArrowUp") go(-1);
    else if (event.key === "u" && !event.ctrlKey) turn("undo");
    else if (event.key === "Enter" && event.target.tagName !== "BUTTON" && suggestionOf(open.row)) {
      label([open.row], suggestionOf(open.row).label);
      go(1);
    } else if (named !== null) {
      label([open.row], named);
      go(1);
    } else return;
    event.preventDefault();
    event.stopPropagation();
  });
  box.addEventListener("close", () => { open = null; });
  draw();
}

on("labels suggestions", () => open && open.draw());
