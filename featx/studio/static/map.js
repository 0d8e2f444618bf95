// Map: all photos in two dimensions, on a canvas. Zoom, hover, lasso, label.

import {signs} from "./chips.js";
import {classPanel} from "./classes.js";
import {button, empty, leadTo, make, noPhotos, onceAFrame, plural} from "./dom.js";
import {Grid} from "./grid.js";
import {labelOfKey, typing} from "./keys.js";
import {colourOf, shapeOf, swatch} from "./palette.js";
import {bySuggestion, label, LEFT_OUT, nameOf, NO_LABEL, on, read, say, store, suggestionOf, thumb} from "./store.js";
import {view} from "./viewer.js";

const METHODS = {pca: "A first, rough map; a better one is on its way.", tsne: "Photos that look alike lie close together."};
const BY = [["label", "label"], ["suggestion", "suggestion"], ["unknown", "unlike the labelled"], ["folder", "folder"], ["split", "split"]];
const SPLITS = ["train", "val", "test"];
const SPRITE = 28;

export function build(section) {
  let map = null, wanted = -1, selection = new Set(), clearing = false;
  const canvas = make("canvas", {tabindex: "0", role: "img"});
  const by = make("select", {"aria-label": "Colour"}, ...BY.map(([value, text]) => new Option(text, value)));
  const legend = make("ul", {class: "legend"}), note = make("p", {class: "soft small"});
  const tip = make("div", {class: "tip", hidden: true}, make("img", {alt: ""}), make("p"));
  const grid = new Grid({label: "Selected photos", size: 84, decorate: signs, open: (row) => view(row, grid.rows)});
  const chosen = make("p", {class: "small"});
  const panel = classPanel({selected: () => [...selection], after: () => { clearing = true; }});
  const pan = make("button", {type: "button", "aria-pressed": "false", text: "Move", on: {click: () => pan.setAttribute("aria-pressed", String(!panning()))}});
  const panning = () => pan.getAttribute("aria-pressed") === "true";
  const stage = make("div", {class: "stage"}, canvas, tip);
  const work = make("div", {class: "map-work"},
    make("div", {class: "grid-side"},
      make("div", {class: "toolbar"}, make("label", {}, "Colour ", by), make("div", {class: "row"}, button("+", () => zoom(1.4), "", {"aria-label": "Zoom in"}),
        button("−", () => zoom(1 / 1.4), "", {"aria-label": "Zoom out"}), button("All", fit, "", {"aria-label": "All: the whole map"}), pan,
        button("Select what is in view", inView)), note),
      legend, stage),
    make("aside", {class: "side"}, panel.element, make("section", {class: "class-panel picked", "aria-label": "Selection"},
      make("h2", {text: "Selection"}), chosen, make("div", {class: "grid-box"}, grid.element))));
  const first = make("div");
  section.append(first, work);

  let camera = {scale: 1, x: 0, y: 0};  // a point p of the map is drawn at (p - (x, y)) * scale * half + middle
  let width = 0, height = 0, ratio = 1, lasso = null, asked = 0, hovered = null;
  let fitted = true;  // the whole map is in view, and stays so when the window changes
  const pen = canvas.getContext("2d");
  const sprites = new Map();

  // --- colours: each photo belongs to a group, and each group has a mark ---

  let groupOf = [], groups = [];  // group of each row; groups: {text, label (its mark), n}

  function paint() {
    const keys = new Map();
    groups = [];
    const group = (key, text, mark) => {
      if (!keys.has(key)) {
        keys.set(key, groups.length);
        groups.push({text, mark, n: 0});
      }
      groups[keys.get(key)].n++;
      return keys.get(key);
    };
    const folders = new Map();
    groupOf = map ? map.x.map((x, row) => {
      const now = store.labels[row] ?? NO_LABEL;
      if (x === null || now === LEFT_OUT) return -1;
      if (by.value === "label") return group(now, nameOf(now), now);
      const suggested = suggestionOf(row);
      if (by.value === "suggestion") return suggested ? group(suggested.label, nameOf(suggested.label), suggested.label) : group(-1, "nothing suggested", -1);
      if (by.value === "unknown") return suggested ? suggested.unknown ? group(1, "unlike the labelled", 5) : group(0, "like the labelled", 1) : group(-1, "cannot tell yet", -1);
      if (by.value === "split") return group(store.splits[row], store.splits[row] || "no split", SPLITS.indexOf(store.splits[row]));
      const folder = store.ids[row].includes("/") ? store.ids[row].split("/")[0] : "no folder";
      if (!folders.has(folder)) folders.set(folder, folders.size);
      return group(folder, folder, folders.get(folder));
    }) : [];
    legend.replaceChildren(...groups.map((each, i) => ({...each, i})).sort((a, b) => (a.mark < 0) - (b.mark < 0) || Math.abs(a.mark) - Math.abs(b.mark))
      .map(({text, mark, n}) => make("li", {}, swatch(mark), `${text} `, make("span", {class: "soft", text: n.toLocaleString("en")}))));
    canvas.setAttribute("aria-label", `Map of ${plural(groups.reduce((sum, {n}) => sum + n, 0))}, coloured by ${BY.find(([value]) => value === by.value)[1]}: ` +
      `${groups.map(({text, n}) => `${text} ${n}`).join(", ")}. Keys: plus and minus zoom, arrows move, v selects what is in view.`);
    later();
  }

  /** The mark of a class, drawn once. */
  function sprite(mark, faint) {
    const key = `${mark} ${faint} ${ratio} ${grown()} ${dark.matches}`;
    if (!sprites.has(key)) {
      const made = document.createElement("canvas"), pencil = made.getContext("2d");
      made.width = made.height = SPRITE;
      pencil.translate(SPRITE / 2, SPRITE / 2);
      const size = (mark === NO_LABEL ? 2.2 : 4.2) * grown() * ratio;
      pencil.scale(size, size);
      const shape = new Path2D(shapeOf(mark));
      pencil.fillStyle = colourOf(mark);
      pencil.globalAlpha = faint ? .25 : mark === NO_LABEL ? .65 : 1;
      pencil.fill(shape);
      if (mark !== NO_LABEL && !faint) {
        pencil.lineWidth = 1 / size;
        pencil.strokeStyle = dark.matches ? "#000" : "#fff";
        pencil.stroke(shape);
      }
      sprites.set(key, made);
    }
    return sprites.get(key);
  }
  const grown = () => groupOf.length < 2000 ? 1.35 : 1;  // few photos are drawn larger
  const dark = matchMedia("(prefers-color-scheme: dark)");
  dark.addEventListener("change", () => later());

  // --- drawing ---

  const half = () => Math.min(width, height) / 2;
  const toScreen = (row) => [(map.x[row] - camera.x) * camera.scale * half() + width / 2, (map.y[row] - camera.y) * camera.scale * half() + height / 2];
  const toMap = (sx, sy) => [(sx - width / 2) / half() / camera.scale + camera.x, (sy - height / 2) / half() / camera.scale + camera.y];

  function later() {
    if (!asked && !section.hidden) asked = requestAnimationFrame(render);
  }

  function render() {
    asked = 0;
    if (!map || !width) return;
    pen.setTransform(1, 0, 0, 1, 0, 0);
    pen.clearRect(0, 0, canvas.width, canvas.height);
    const zoomed = camera.scale * half() * ratio, left = canvas.width / 2 - camera.x * zoomed, top = canvas.height / 2 - camera.y * zoomed;
    const faint = selection.size > 0;
    // What is not labelled lies below, what is selected on top.
    const order = groups.map((_, i) => i).sort((a, b) => groups[a].mark - groups[b].mark);
    const pictures = groups.map(({mark}) => [sprite(mark, false), sprite(mark, true)]);
    for (const group of order) {
      for (let row = 0; row < groupOf.length; row++) {
        if (groupOf[row] !== group || (faint && selection.has(row))) continue;
        const x = left + map.x[row] * zoomed, y = top + map.y[row] * zoomed;
        if (x < -12 || y < -12 || x > canvas.width + 12 || y > canvas.height + 12) continue;
        pen.drawImage(pictures[group][faint ? 1 : 0], Math.round(x - SPRITE / 2), Math.round(y - SPRITE / 2));
      }
    }
    for (const row of selection) {
      if (groupOf[row] === undefined || groupOf[row] < 0) continue;
      pen.drawImage(pictures[groupOf[row]][0], Math.round(left + map.x[row] * zoomed - SPRITE / 2), Math.round(top + map.y[row] * zoomed - SPRITE / 2));
    }
    pen.scale(ratio, ratio);
    const styles = getComputedStyle(section);
    if (hovered !== null) {
      const [x, y] = toScreen(hovered);
      pen.beginPath();
      pen.arc(x, y, 8, 0, 2 * Math.PI);
      pen.lineWidth = 2;
      pen.strokeStyle = styles.getPropertyValue("--ink");
      pen.stroke();
    }
    if (lasso) {
      pen.beginPath();
      lasso.forEach(([x, y], i) => (i ? pen.lineTo(x, y) : pen.moveTo(x, y)));
      pen.closePath();
      pen.strokeStyle = pen.fillStyle = styles.getPropertyValue("--accent");
      pen.lineWidth = 2;
      pen.stroke();
      pen.globalAlpha = .15;
      pen.fill();
      pen.globalAlpha = 1;
    }
  }

  new ResizeObserver(() => {
    ratio = Math.min(2, devicePixelRatio || 1);
    width = stage.clientWidth;
    height = stage.clientHeight;
    canvas.width = Math.round(width * ratio);
    canvas.height = Math.round(height * ratio);
    if (fitted && map) fit();
    later();
  }).observe(stage);

  // --- moving about ---

  function zoom(times, sx = width / 2, sy = height / 2) {
    const [mx, my] = toMap(sx, sy);
    camera.scale = Math.min(60, Math.max(.3, camera.scale * times));
    fitted = false;
    const [nx, ny] = toMap(sx, sy);
    camera.x += mx - nx;
    camera.y += my - ny;
    later();
  }

  function shift(dx, dy) {
    camera.x -= dx / half() / camera.scale;
    camera.y -= dy / half() / camera.scale;
    fitted = false;
    later();
  }

  function fit() {
    let [left, right, top, bottom] = [1, -1, 1, -1];
    for (let row = 0; row < groupOf.length; row++) {
      if (groupOf[row] < 0) continue;
      [left, right] = [Math.min(left, map.x[row]), Math.max(right, map.x[row])];
      [top, bottom] = [Math.min(top, map.y[row]), Math.max(bottom, map.y[row])];
    }
    const scale = Math.min((width - 60) / Math.max(right - left, .01), (height - 60) / Math.max(bottom - top, .01)) / half();
    camera = {scale: Math.max(.1, scale), x: (left + right) / 2, y: (top + bottom) / 2};
    fitted = true;
    later();
  }

  canvas.addEventListener("wheel", (event) => {
    event.preventDefault();
    zoom(Math.exp(-event.deltaY * (event.deltaMode ? .05 : .0015)), event.offsetX, event.offsetY);
  }, {passive: false});

  // --- pointing, lasso ---

  let last = null;
  canvas.addEventListener("pointerdown", (event) => {
    if (event.button > 1) return;
    canvas.setPointerCapture(event.pointerId);
    last = [event.offsetX, event.offsetY, panning() || event.button === 1 ? "pan" : "lasso", event.shiftKey || event.ctrlKey];
    if (last[2] === "lasso") lasso = [[event.offsetX, event.offsetY]];
    hover(null);
  });
  canvas.addEventListener("pointermove", (event) => {
    if (!last) return hover(nearest(event.offsetX, event.offsetY), event);
    if (last[2] === "pan") {
      shift(event.offsetX - last[0], event.offsetY - last[1]);
      last[0] = event.offsetX;
      last[1] = event.offsetY;
    } else {
      lasso.push([event.offsetX, event.offsetY]);
      later();
    }
    return undefined;
  });
  canvas.addEventListener("pointerup", (event) => {
    if (last && last[2] === "lasso") {
      const long = lasso.reduce((far, [x, y]) => Math.max(far, Math.hypot(x - lasso[0][0], y - lasso[0][1])), 0);
      if (long > 5) choose(inside(lasso), last[3]);
      else {
        const row = nearest(event.offsetX, event.offsetY);
        choose(row === null ? [] : [row], last[3]);
      }
    }
    last = lasso = null;
    later();
  });
  canvas.addEventListener("pointercancel", () => { last = lasso = null; later(); });
  canvas.addEventListener("pointerleave", () => hover(null));
  canvas.addEventListener("dblclick", (event) => {
    const row = nearest(event.offsetX, event.offsetY);
    if (row !== null) view(row, selection.has(row) ? [...selection] : [row]);
  });

  function nearest(sx, sy) {
    if (!map) return null;
    const [mx, my] = toMap(sx, sy), reach = 10 / half() / camera.scale;
    let best = null, least = reach * reach;
    for (let row = 0; row < groupOf.length; row++) {
      if (groupOf[row] < 0) continue;
      const far = (map.x[row] - mx) ** 2 + (map.y[row] - my) ** 2;
      if (far < least) [best, least] = [row, far];
    }
    return best;
  }

  /** Photos inside a lasso, by the even-odd rule. */
  function inside(ring) {
    const found = [];
    for (let row = 0; row < groupOf.length; row++) {
      if (groupOf[row] < 0) continue;
      const [x, y] = toScreen(row);
      let within = false;
      for (let i = 0, j = ring.length - 1; i < ring.length; j = i++) {
        const [xi, yi] = ring[i], [xj, yj] = ring[j];
        if ((yi > y) !== (yj > y) && x < (xj - xi) * (y - yi) / (yj - yi) + xi) within = !within;
      }
      if (within) found.push(row);
    }
    return found;
  }

  function inView() {
    choose(inside([[0, 0], [width, 0], [width, height], [0, height]]), false);
  }

  function choose(rows, more) {
    selection = new Set(more ? [...selection, ...rows] : rows);
    picked();
  }

  function picked() {
    const rows = [...selection];
    chosen.textContent = rows.length ? `${plural(rows.length)} selected. Press a key or click a class to label ${rows.length === 1 ? "it" : "them"}.`
      : "Draw around photos to select them.";
    grid.show(rows, {top: true});
    grid.refresh();
    panel.tell();
    if (rows.length) say(`${plural(rows.length)} selected.`);
    later();
  }

  function hover(row, event) {
    if (row === null) {
      tip.hidden = true;
      if (hovered !== null) later();
      hovered = null;
      return;
    }
    if (row !== hovered) {
      hovered = row;
      tip.firstChild.src = thumb(row);
      tip.lastChild.textContent = signs(row).text;
      later();
    }
    tip.hidden = false;
    const x = event.offsetX + 16 + 170 > width ? event.offsetX - 186 : event.offsetX + 16;
    tip.style.transform = `translate(${x}px, ${Math.min(event.offsetY, Math.max(0, height - 220))}px)`;
  }

  // --- keys ---

  document.addEventListener("keydown", (event) => {
    if (section.hidden || work.hidden || typing(event) || event.ctrlKey || event.metaKey || event.altKey) return;
    const {key} = event, named = labelOfKey(event), inGrid = grid.element.contains(event.target);
    const moves = {ArrowLeft: [60, 0], ArrowRight: [-60, 0], ArrowUp: [0, 60], ArrowDown: [0, -60]};
    if (named !== null && key !== "-") panel.give(named);
    else if (key === "+" || key === "=") zoom(1.4);
    else if (key === "-") zoom(1 / 1.4);
    else if (key in moves && !inGrid) shift(...moves[key]);
    else if (key === "f") fit();
    else if (key === "v") inView();
    else if (key === "Escape") choose([], false);
    else if (key === "Enter" && event.target === canvas && selection.size) accept();
    else if (key === "o" && grid.cursor !== null) view(grid.cursor, grid.rows);
    else if (key === "/") panel.type(canvas);
    else if (/^\p{L}$/u.test(key) && !"uo".includes(key)) {
      panel.type(canvas);
      return;
    } else return;
    event.preventDefault();
  });

  function accept() {
    const suggested = bySuggestion(selection);
    clearing = suggested.size > 0;
    if (!clearing) say("Nothing is suggested for the selection.");
    for (const [number, rows] of suggested) label(rows, number, "map");
  }

  // --- what happens ---

  by.addEventListener("change", paint);
  const repaint = onceAFrame(paint);

  async function loadMap() {
    const {version} = store.state.map;
    if (version === wanted && map) return;
    wanted = version;
    const answer = await read("/api/map");
    if (answer && answer.x && answer.x.length) map = answer;
    draw();
    if (map) fit();
  }

  function draw() {
    const {open, map: about} = store.state || {};
    by.lastChild.hidden = !store.splits.length;
    if (by.value === "split" && by.lastChild.hidden) by.value = "label";
    const ready = Boolean(open && map);
    work.hidden = !ready;
    if (ready) {
      first.replaceChildren();
      note.textContent = METHODS[map.method] || "";
      paint();
      picked();
      return;
    }
    first.replaceChildren(!open
      ? noPhotos()
      : about.status === "failed" ? empty("The map could not be drawn", about.message)
        : about.status === "few" ? empty("Too few photos for a map", about.message)
        : empty("The map is on its way", about.message || "It is drawn when the photos have been read. You can label meanwhile.", leadTo("label", "Label")));
  }

  on("opened", () => {
    map = null;
    wanted = -1;
    selection = new Set();
  });
  on("map loaded", () => {
    if (!section.hidden && store.state?.open) loadMap();
  });
  on("labels", (rows) => {
    if (clearing) {
      clearing = false;
      selection = new Set();
      if (!section.hidden) picked();
    }
    if (section.hidden || !map) return;
    repaint();
    grid.refresh(rows);
  });
  on("suggestions", () => {
    if (section.hidden || !map) return;
    repaint();
    grid.refresh();
  });

  return {
    show() {
      draw();
      if (store.state?.open) loadMap();
    },
  };
}
