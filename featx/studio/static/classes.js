// The panel of classes: names, counts and keys; a click labels the selection. Used beside the grid and beside the map.

import {button, dialog, make, onceAFrame, plural} from "./dom.js";
import {keyOf} from "./keys.js";
import {swatch} from "./palette.js";
import {changeClass, classNumbers, counts, label, LEFT_OUT, nameOf, NONE, on, say, store, UNSURE} from "./store.js";

/**
 * `selected()` gives the rows to label, `after(rows)` is called before they get a label, `filter(label)` shows the photos of one label.
 * The panel has `element`, and `type(letter)`, which starts the name of a class.
 */
export function classPanel({selected, after = () => {}, filter = null}) {
  const list = make("ul", {class: "classes"});
  const field = make("input", {type: "text", placeholder: "Name of a class", "aria-label": "Type a class name, Enter labels the selection",
    autocomplete: "off", spellcheck: "false", maxlength: "100", list: "class-names"});
  const hint = make("p", {class: "soft small"});
  const add = make("form", {class: "class-add", on: {submit: given}}, field, make("button", {class: "primary", text: "Add"}));
  const element = make("section", {class: "class-panel", "aria-label": "Classes"}, make("h2", {text: "Classes"}), add, hint, list);
  const names = make("datalist", {id: "class-names"});
  if (!document.getElementById("class-names")) document.body.append(names);
  let back = null;

  function given(event) {
    event.preventDefault();
    const name = matching(field.value.trim());
    if (!name) return;
    const rows = selected();
    field.value = "";
    tell();
    if (rows.length) give(rows, store.classes.includes(name) ? store.classes.indexOf(name) : name);
    else if (store.classes.includes(name)) say(`There is a class "${name}" already. Select photos, then press ${keyOf(store.classes.indexOf(name)) || "Enter here"}.`);
    else changeClass({op: "add", name}).then(() => say(`New class: ${name}. Select photos, then press ${keyOf(store.classes.indexOf(name)) || "its name"}.`), refused);
    if (back && back.isConnected) back.focus();
    back = null;
  }

  // "be" is enough for "bee", where no other class begins so; a new class needs its whole name once.
  function matching(text) {
    const same = classNumbers().map(nameOf).filter((name) => name.toLowerCase() === text.toLowerCase());
    return same[0] || text;
  }

  function give(rows, what) {
    if (rows.length) after(rows);
    label(rows, what);
  }

  function tell() {
    const n = selected().length, text = field.value.trim();
    add.lastChild.textContent = n ? "Label" : "Add";
    if (!text) hint.textContent = n ? `${plural(n)} selected: press a key, click a class or type a name.` : "Select photos, then press a key or type a name.";
    else if (classNumbers().some((each) => nameOf(each).toLowerCase() === text.toLowerCase())) hint.textContent = `Enter: ${n ? `label ${plural(n)}` : "select photos first"}.`;
    else hint.textContent = `Enter: new class "${text}"${n ? ` for ${plural(n)}` : ""}.`;
  }

  field.addEventListener("input", tell);
  field.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    field.value = "";
    tell();
    if (back && back.isConnected) back.focus();
    event.stopPropagation();
  });

  function line(number, found) {
    const n = found.get(number) || 0, key = number >= 0 ? keyOf(number) : {[NONE]: "0", [UNSURE]: "-", [LEFT_OUT]: ""}[number];
    const press = make("button", {type: "button", class: "class-line", on: {click: () => give(selected(), number)},
      "aria-keyshortcuts": key || null, title: `Label the selection ${nameOf(number)}`},
      make("kbd", {text: key, class: key ? "" : "blank", "aria-hidden": "true"}), swatch(number),
      make("span", {class: "class-name", text: nameOf(number)}),
      make("span", {class: "class-count", text: n.toLocaleString("en")}, make("span", {class: "unseen", text: n === 1 ? " photo" : " photos"})));
    const more = number >= 0 || (filter && n)
      ? button("⋯", () => number >= 0 ? edit(number) : filter(number), "quiet more", {"aria-label": number >= 0 ? `Change ${nameOf(number)}` : `Show ${nameOf(number)}`})
      : make("span", {class: "more"});
    return make("li", {"data-label": number}, press, more);
  }

  function edit(number) {
    const name = nameOf(number), others = classNumbers().filter((each) => each !== number), n = counts().get(number) || 0;
    const called = make("input", {type: "text", value: name, "aria-label": "Name", maxlength: "100", required: true, autofocus: true, autocomplete: "off"});
    const into = make("select", {}, ...others.map((each) => new Option(nameOf(each), each)));
    const wrong = make("p", {class: "bad", role: "alert"});
    const box = dialog(name,
      make("form", {class: "row", on: {submit: (event) => {
        event.preventDefault();
        const wanted = called.value.trim();
        const twin = others.find((each) => nameOf(each) === wanted);
        if (wanted === name) box.close();
        else if (twin !== undefined) wrong.replaceChildren(`There is a class "${wanted}" already. `, button(`Merge ${name} into it`, () => act({op: "merge", class: number, into: twin}, `${name} is now part of ${wanted}.`)));
        else act({op: "rename", class: number, name: wanted}, `${name} is now called ${wanted}.`);
      }}}, called, make("button", {class: "primary", text: "Rename"})),
      wrong,
      others.length ? make("div", {class: "row"}, make("label", {}, "Merge it into ", into), button("Merge", () => act({op: "merge", class: number, into: Number(into.value)}, `${name} is now part of ${nameOf(Number(into.value))}.`))) : null,
      make("div", {class: "row"},
        filter ? button(`Show its ${plural(n)}`, () => { box.close(); filter(number); }) : null,
        button("Remove", () => act({op: "remove", class: number}, `${name} is removed; ${n === 1 ? "its photo has" : `its ${plural(n)} have`} no label now.`), "bad")),
      make("p", {class: "soft small", text: "All of this can be undone."}));
    const act = async (body, done) => {
      try {
        await changeClass(body);
        box.close();
        say(done, {undo: true});
      } catch (error) {
        wrong.textContent = error.message;
      }
    };
  }

  function refused(error) {
    say(error.message, {bad: true});
  }

  function render() {
    const found = counts(), focused = list.contains(document.activeElement) && document.activeElement.closest("li").dataset.label;
    const numbers = classNumbers();
    list.replaceChildren(...[...numbers, NONE, UNSURE].map((number) => line(number, found)),
      ...(found.get(LEFT_OUT) ? [line(LEFT_OUT, found)] : []));
    document.getElementById("class-names").replaceChildren(...numbers.map((each) => new Option(nameOf(each))));
    if (focused) list.querySelector(`[data-label="${focused}"] button`)?.focus();
    tell();
  }

  on("labels loaded", onceAFrame(render));
  render();

  return {
    element, tell,
    /** Go to the field, from where the focus comes back afterwards. */
    type(from) {
      back = from;
      field.focus();
    },
    /** Label the selection by a key. */
    give: (what) => give(selected(), what),
  };
}

