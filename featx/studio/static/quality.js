// How good? Accuracy with its interval, what more labels are worth, per class, the confusions and their photos.

import {post} from "./api.js";
import {signs} from "./chips.js";
import {bar, learningCurve} from "./chart.js";
import {button, dialog, empty, interval, leadTo, likely, make, noPhotos, percent, plural} from "./dom.js";
import {Grid} from "./grid.js";
import {labelOfKey} from "./keys.js";
import {swatch} from "./palette.js";
import {label, labelled, nameOf, on, say, store, thumb} from "./store.js";
import {view} from "./viewer.js";

export function build(section) {
  const page = make("div", {class: "sheet"});
  section.append(page);
  const settled = new Set();  // doubtful photos whose label the user has confirmed, in this window

  const card = (title, kind, ...children) => make("section", {class: `card ${kind}`, "aria-label": title}, make("h2", {text: title}), ...children);

  function head({accuracy, majority, pixels, n}) {
    return make("section", {class: "card headline", "aria-label": "Accuracy"},
      make("p", {class: "big"}, make("strong", {text: percent(accuracy.mean)}), make("span", {class: "soft", text: ` right, ${likely(accuracy)}`})),
      bar(accuracy, "Accuracy"),
      make("p", {text: `Each photo was named by a classifier that did not know its label. Measured on ${accuracy.on.replace(/\.+$/, "")}.`}),
      make("dl", {class: "compare"},
        make("dt", {text: "Always naming the most frequent class"}), make("dd", {text: percent(majority)}),
        ...(pixels ? [make("dt", {text: "Looking at bare pixels only, without a network"}), make("dd", {text: interval(pixels)})] : [])),
      make("p", {class: "soft small", text: `${plural(n, "labelled photo")} used.`}));
  }

  function progress({curve, forecast, majority}) {
    if (!curve || curve.length < 2) {
      return card("What more labels are worth", "", make("p", {class: "soft", text: forecast || "Cannot tell yet: it takes a few more labels of each class."}));
    }
    return card("What more labels are worth", "", make("p", {class: "forecast", text: forecast || "Cannot tell yet what ten more of each class would be worth."}),
      learningCurve(curve, majority));
  }

  function perClass({classes}) {
    return card("Class by class", "", make("p", {class: "soft small", text: "Of the photos of each class, how many are named rightly."}),
      make("div", {class: "per-class"}, ...[...classes].sort((a, b) => a.recall.mean - b.recall.mean).flatMap(({class: each, n, recall, hint}) => [
        make("span", {class: "who"}, swatch(each), make("span", {text: nameOf(each)})), bar(recall, nameOf(each)),
        make("span", {class: "value", text: interval(recall)}), make("span", {class: "soft small", text: `${plural(n)}${hint ? `. ${hint}` : ""}`})])));
  }

  function confusion({confusion: {classes, counts, cells}}) {
    const most = Math.max(1, ...counts.flat());
    return card("What is taken for what", "", make("p", {class: "soft small", text: "Rows: your labels. Columns: what the classifier named. A number opens its photos."}),
      make("div", {class: "wide", tabindex: "0", role: "region", "aria-label": "Confusions"}, make("table", {class: "confusion"},
        make("thead", {}, make("tr", {}, make("th", {scope: "col", text: "label ↓  named →"}), ...classes.map((each) => make("th", {scope: "col"}, swatch(each), " ", nameOf(each))))),
        make("tbody", {}, ...classes.map((row, i) => make("tr", {}, make("th", {scope: "row"}, swatch(row), " ", nameOf(row)),
          ...classes.map((column, j) => {
            const n = counts[i][j], rows = cells[`${row},${column}`] || [];
            const cell = make("td", {class: i === j ? "right" : n ? "wrong" : ""});
            if (n) cell.style.setProperty("--share", `${Math.round(12 + 60 * n / most)}%`);
            const about = `labelled ${nameOf(row)}, named ${nameOf(column)}`;
            cell.append(n ? button(n.toLocaleString("en"), () => gallery(about, rows), "quiet", {"aria-label": `${plural(n)} ${about}`}) : "·");
            return cell;
          })))))));
  }

  function doubtful({doubtful: found}) {
    const left = found.filter(({row, label: was}) => store.labels[row] === was && !settled.has(row));
    if (!found.length) return null;
    if (!left.length) return card("Look at these again", "", make("p", {class: "soft", text: "All seen to. It is measured anew by itself."}));
    return card("Look at these again", "doubtful", make("p", {class: "soft small", text: "The classifier would have given these another label. Some of them may be slips."}),
      make("div", {class: "doubts"}, ...left.slice(0, 12).map(({row, label: was, suggested, confidence}) => make("figure", {},
        make("button", {type: "button", class: "picture", "aria-label": `Open ${store.ids[row]}`, on: {click: () => view(row, left.map((each) => each.row))}},
          make("img", {src: thumb(row), alt: "", loading: "lazy"})),
        make("figcaption", {class: "small"}, make("span", {text: `Labelled ${nameOf(was)}; ${percent(confidence)} sure it is ${nameOf(suggested)}.`})),
        make("div", {class: "row"}, button(nameOf(suggested), () => label([row], suggested, "quality"), "", {"aria-label": `${nameOf(suggested)}: new label of ${store.ids[row]}`}),
          button(`Keep ${nameOf(was)}`, () => { settled.add(row); draw(); }, "quiet", {"aria-label": `Keep ${nameOf(was)} for ${store.ids[row]}`}))))),
      left.length > 12 ? make("p", {class: "soft small", text: `and ${left.length - 12} more.`}) : null);
  }

  /** The photos of one cell, to look at and to label anew. */
  function gallery(title, rows) {
    const grid = new Grid({label: title, decorate: signs, open: (row) => view(row, rows)});
    const box = dialog(`${plural(rows.length)} ${title}`, make("p", {class: "soft small", text: "Double click or o: the whole photo. 1 to 9: another label."}),
      make("div", {class: "grid-box"}, grid.element));
    box.classList.add("gallery");
    grid.show(rows);
    box.addEventListener("keydown", (event) => {
      const named = labelOfKey(event);
      if (event.key === "o" && grid.cursor !== null) view(grid.cursor, rows);
      else if (named !== null) label(grid.selected(), named, "quality");
      else return;
      event.preventDefault();
    });
    const shown = (changed) => grid.refresh(changed);
    watching.add(shown);
    box.addEventListener("close", () => watching.delete(shown));
    grid.element.focus();
  }
  const watching = new Set();

  async function measure() {
    try {
      await post("/api/measure");
    } catch (error) {
      say(error.message, {bad: true});
    }
  }

  function draw() {
    const {state, quality} = store;
    if (!state || !state.open) {
      page.replaceChildren(noPhotos());
      return;
    }
    const running = state.quality.status === "running" || quality?.status === "running";
    if (state.quality.status === "failed") {
      page.replaceChildren(empty("It could not be measured", state.quality.message, button("Try again", measure, "primary")));
      return;
    }
    if (!quality || !quality.accuracy) {
      const why = quality?.reason || "";
      page.replaceChildren(running ? empty("Measuring …", `${labelled()} labels are being looked at. This takes a little while.`)
        : empty("Cannot tell yet", why.replace(/^Cannot tell yet:\s*(.)/, (_, letter) => letter.toUpperCase()) || "It takes a few labelled photos of each class.",
          leadTo("label", "Label more photos")));
      return;
    }
    const focused = document.activeElement && page.contains(document.activeElement) ? document.activeElement.getAttribute("aria-label") : null;
    page.replaceChildren(...[
      make("p", {class: "soft small status", role: "status", text: running ? "Measuring anew …" : ""}),
      head(quality), progress(quality), perClass(quality), confusion(quality), doubtful(quality),
      quality.notes && quality.notes.length ? card("Good to know", "", make("ul", {class: "plain"}, ...quality.notes.map((text) => make("li", {text})))) : null,
      make("p", {class: "next"}, make("a", {class: "button", href: "#label", text: "Label more"}), leadTo("take", "Take it along")),
    ].filter(Boolean));
    if (focused) [...page.querySelectorAll("[aria-label]")].find((each) => each.getAttribute("aria-label") === focused)?.focus();
  }

  on("opened", () => settled.clear());
  on("quality loaded", () => { if (!section.hidden) draw(); });
  on("labels", (rows) => {
    for (const listener of watching) listener(rows);
    if (!section.hidden && !document.querySelector("dialog[open]")) draw();
  });

  return {show: draw};
}
