// The small signs on a photo: its label (solid), or what is suggested for it (faint).

import {make} from "./dom.js";
import {colourOf, inkOf, swatch} from "./palette.js";
import {nameOf, NO_LABEL, store, suggestionOf} from "./store.js";

export function chip(label) {
  if (label === NO_LABEL) return make("span", {class: "chip none", text: "no label"});
  const made = make("span", {class: label >= 0 ? "chip" : "chip aside"}, make("span", {class: "chip-name", text: nameOf(label)}));
  made.style.background = colourOf(label);
  made.style.color = inkOf(label);
  return made;
}

export function suggestionChip({label, percent, unknown}) {
  return make("span", {class: "chip faint"}, swatch(label), make("span", {class: "chip-name", text: nameOf(label)}), " ",
    make("span", {class: "chip-number", text: unknown ? "?" : `${percent}\u00a0%`}));
}

/** What lies on a thumbnail, and what a screen reader says of it. */
export function signs(row) {
  const label = store.labels[row], name = store.ids[row];
  if (label !== NO_LABEL) return {text: `${name}, ${nameOf(label)}`, parts: [chip(label)]};
  const suggested = suggestionOf(row);
  if (!suggested) return {text: `${name}, not labelled`};
  const {percent, unknown} = suggested;
  return {
    text: `${name}, perhaps ${nameOf(suggested.label)} ${unknown ? "?, unlike the labelled photos" : `${percent}\u00a0%`}`,
    parts: [suggestionChip(suggested)],
  };
}
