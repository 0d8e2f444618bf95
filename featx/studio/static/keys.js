// Which key means what, said once: for the views, and for the help.

import {button, dialog, make} from "./dom.js";
import {classNumbers, NO_LABEL, NONE, store, UNSURE} from "./store.js";

/** The key of a class: "1" to "9" for the first nine that there are. */
export function keyOf(number) {
  const place = classNumbers().indexOf(number);
  return place >= 0 && place < 9 ? String(place + 1) : "";
}

/** The label that a key stands for, or null. */
export function labelOfKey({key, ctrlKey, metaKey, altKey}) {
  if (ctrlKey || metaKey || altKey) return null;
  if (key >= "1" && key <= "9") return classNumbers()[key - 1] ?? null;
  return {0: NONE, "-": UNSURE, Delete: NO_LABEL, Backspace: NO_LABEL}[key] ?? null;
}

const HELP = [
  ["Label", [
    ["1 to 9", "label the selection with a class"], ["any letter or /", "type the name of a class; Enter labels the selection"],
    ["Enter", "accept what is suggested for the selection"], ["0", "none of these"], ["-", "unsure"], ["Delete", "no label"]]],
  ["Select", [
    ["Arrows", "move"], ["Shift + arrows", "select more"], ["Space", "add or take away one"], ["Ctrl + A", "all that are shown"],
    ["Drag", "a rectangle of photos"], ["Escape", "nothing"], ["o or double click", "the whole photo"]]],
  ["Everywhere", [
    ["u or Ctrl + Z", "undo"], ["Ctrl + Y or Ctrl + Shift + Z", "redo"], ["[ and ]", "the step before and the next step"],
    ["?", "these keys"]]],
  ["Map", [["+ and -", "zoom"], ["Arrows", "move the map"], ["f", "the whole map"], ["v", "select all that are in view"]]],
];

export function help() {
  if (document.querySelector("dialog[open]")) return;
  const box = dialog("All keys", make("div", {class: "help"}, ...HELP.map(([title, keys]) => make("section", {}, make("h3", {text: title}),
    make("dl", {}, ...keys.flatMap(([key, does]) => [make("dt", {}, make("kbd", {text: key})), make("dd", {text: does})]))))),
    make("p", {class: "soft", text: "A class whose name begins with u or o: press / first. " +
      (store.classes.length > 9 ? "Classes after the ninth are labelled by their names." : "")}));
  box.append(button("Back to work", () => box.close(), "primary"));
}

/** Whether a key press belongs to a field or a control that has the focus, and not to the view. */
export const typing = ({target}) => target.closest("input, select, textarea, dialog") !== null;
