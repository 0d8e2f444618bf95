// A grid of thumbnails that holds only what is on the screen: 10,000 photos scroll like 100. A listbox to screen readers.

import {make} from "./dom.js";
import {Pictures} from "./pictures.js";
import {thumb} from "./store.js";

const GAP = 6, PAD = 8, KEPT = 400, AHEAD = 3, FURTHER = 600;
let made = 0;

export class Grid {
  /**
   * `label` names the grid to screen readers; `decorate(row)` gives {text, parts}: what a screen reader says of a photo, and the
   * elements that lie on its thumbnail; `open(row)` is called on a double click, `changed()` when the selection changes;
   * `pending(row)` is true for photos that have no thumbnail yet; `size` is the least width of a cell, in pixels.
   */
  constructor({label, decorate, open = () => {}, changed = () => {}, pending = () => false, size = 132}) {
    Object.assign(this, {decorate, open, changed, pending, size});
    this.rows = [];
    this.places = new Map();  // row -> place in the order
    this.selection = new Set();
    this.cursor = null;  // the row that the keys are on
    this.anchor = null;  // the row from which shift extends
    this.cells = new Map();  // row -> element on the page
    this.kept = new Map();  // row -> element that went out of sight with its thumbnail, the oldest first
    this.pictures = new Pictures((row) => { if (this.cells.has(row)) this.#picture(this.cells.get(row), row); });
    this.name = `grid${made++}`;
    this.space = make("div", {class: "grid-space", role: "presentation"});
    this.band = make("div", {class: "band", hidden: true});
    this.element = make("div", {class: "grid", role: "listbox", tabindex: "0", "aria-label": label, "aria-multiselectable": "true"},
      this.space);
    this.space.append(this.band);
    this.element.addEventListener("scroll", () => {
      this.top = this.element.scrollTop;
      this.#later();
    }, {passive: true});
    this.element.addEventListener("keydown", (event) => this.press(event));
    this.element.addEventListener("focus", () => {
      if (this.cursor === null && this.rows.length) this.#point(this.rows[Math.min(this.#first(), this.rows.length - 1)]);
    });
    this.#mouse();
    // Asking the page for lengths makes it lay itself out: they are kept, so that a key costs no layout.
    this.width = this.height = this.top = 0;
    new ResizeObserver(() => {
      this.width = this.element.clientWidth;
      this.height = this.element.clientHeight;
      this.top = this.element.scrollTop;
      this.#measure();
    }).observe(this.element);
  }

  /** Show these photos in this order. The selection stays with its photos; those that are gone leave it. */
  show(rows, {top = false} = {}) {
    this.rows = rows;
    this.places = new Map(rows.map((row, place) => [row, place]));
    const before = this.selection.size;
    for (const row of this.selection) if (!this.places.has(row)) this.selection.delete(row);
    if (!this.places.has(this.cursor)) this.cursor = null;
    if (!this.places.has(this.anchor)) this.anchor = this.cursor;
    if (top) this.#scroll(0);
    this.#measure();
    if (before !== this.selection.size) this.changed();
  }

  /** Draw the labels of these photos anew, or of all that are in sight. */
  refresh(rows = null) {
    if (rows === null || rows.length > this.cells.size) {
      this.kept.clear();
      for (const [row, cell] of this.cells) this.#fill(cell, row);
      return;
    }
    for (const row of rows) {
      this.kept.delete(row);
      const cell = this.cells.get(row);
      if (cell) this.#fill(cell, row);
    }
  }

  /** Change the least width of a cell, with the photo under the cursor kept in sight. */
  resize(size) {
    this.size = size;
    this.#measure();
    if (this.cursor !== null) this.reveal(this.cursor);
  }

  /** Select these photos and no others, and put the cursor on the last of them, or on `cursor`. */
  select(rows, cursor = rows.at(-1) ?? this.cursor) {
    this.selection = new Set(rows.filter((row) => this.places.has(row)));
    this.anchor = cursor;
    this.#point(cursor);
    this.#mark();
  }

  /** Selected photos, in the order in which they are shown; without a selection none. */
  selected() {
    return [...this.selection].sort((a, b) => this.places.get(a) - this.places.get(b));
  }

  /** Scroll until a photo is in sight. */
  reveal(row) {
    const place = this.places.get(row);
    if (place === undefined || !this.columns || !this.height) return;  // out of sight there is nothing to scroll
    const top = PAD + Math.floor(place / this.columns) * this.step, bottom = top + this.step;
    if (top - PAD < this.top) this.#scroll(top - PAD);
    else if (bottom > this.top + this.height) this.#scroll(bottom - this.height + PAD);
  }

  #scroll(top) {
    this.element.scrollTop = this.top = top;
  }

  // --- where things are ---

  #measure() {
    const width = this.width - 2 * PAD;
    if (width <= 0) return;
    this.columns = Math.max(1, Math.floor((width + GAP) / (this.size + GAP)));
    this.side = Math.floor((width - GAP * (this.columns - 1)) / this.columns);
    this.step = this.side + GAP;
    const height = 2 * PAD + Math.ceil(this.rows.length / this.columns) * this.step;
    this.space.style.height = `${height}px`;
    this.top = Math.max(0, Math.min(this.top, height - this.height));  // as the browser does when there are fewer photos
    this.#render();
  }

  #first() {
    return Math.max(0, Math.floor((this.top - PAD) / this.step)) * this.columns;
  }

  #later() {
    if (this.asked) return;
    this.asked = requestAnimationFrame(() => this.#render());
  }

  #render() {
    this.asked = 0;
    if (!this.columns) return;
    const from = this.#first();
    const to = Math.ceil((this.top + this.height) / this.step) * this.columns;
    const more = Math.ceil(this.height / this.step) * this.columns;
    const wanted = new Map();
    const want = (start, end) => {
      for (let place = Math.max(0, start); place < Math.min(end, this.rows.length); place++) wanted.set(this.rows[place], place);
    };
    want(from, to);  // what is in sight first: its thumbnails are asked for first
    const down = this.top >= (this.before ?? 0);
    this.before = this.top;
    want(down ? to : from - AHEAD * more, down ? to + AHEAD * more : from);  // then where it goes
    want(down ? from - more : to, down ? from : to + more);
    for (const [row, cell] of this.cells) {
      if (wanted.has(row)) continue;
      cell.remove();
      this.cells.delete(row);
      if (cell.dataset.state === "shown") this.kept.set(row, cell);
    }
    for (const row of this.kept.keys()) {
      if (this.kept.size <= KEPT) break;
      this.kept.delete(row);
    }
    for (const [row, place] of wanted) {
      let cell = this.cells.get(row);
      if (!cell) {
        cell = this.kept.get(row) || this.#cell(row);
        this.kept.delete(row);
        this.cells.set(row, cell);
        this.space.append(cell);
      }
      const x = PAD + (place % this.columns) * this.step, y = PAD + Math.floor(place / this.columns) * this.step;
      if (cell.x !== x || cell.y !== y || cell.side !== this.side) {
        cell.style.transform = `translate(${x}px, ${y}px)`;
        cell.style.width = cell.style.height = `${this.side}px`;
        Object.assign(cell, {x, y, side: this.side});
      }
      if (cell.place !== place || cell.total !== this.rows.length) {
        cell.setAttribute("aria-posinset", place + 1);
        cell.setAttribute("aria-setsize", this.rows.length);
        Object.assign(cell, {place, total: this.rows.length});
      }
    }
    const further = down ? this.rows.slice(to + AHEAD * more, to + FURTHER) : this.rows.slice(Math.max(0, from - FURTHER), Math.max(0, from - AHEAD * more)).reverse();
    this.pictures.want([...wanted.keys(), ...further].filter((row) => !this.pending(row)));
    this.#mark(false);
  }

  #cell(row) {
    const image = make("img", {alt: "", draggable: "false", decoding: "async"});
    const cell = make("div", {class: "cell", role: "option", id: `${this.name}-${row}`}, image);
    image.addEventListener("load", () => { cell.dataset.state = "shown"; });
    this.#fill(cell, row);
    return cell;
  }

  #picture(cell, row) {
    const picture = this.pictures.of(row), image = cell.firstChild;
    if (cell.dataset.state === "shown" && image.getAttribute("src") === picture) return;
    cell.dataset.state = picture === "" ? "unreadable" : "loading";
    if (picture) image.src = picture;
    else image.removeAttribute("src");
  }

  #fill(cell, row) {
    const image = cell.firstChild;
    if (this.pending(row)) {
      cell.dataset.state = "pending";
      image.removeAttribute("src");
    } else if (cell.address !== thumb(row)) {
      cell.address = thumb(row);
      this.#picture(cell, row);
    }
    const {text, parts = []} = this.decorate(row);
    if (cell.dataset.text === text) return;  // it says all that is drawn
    cell.dataset.text = text;
    for (const part of parts) part.setAttribute("aria-hidden", "true");  // said already, in words
    cell.replaceChildren(image, make("span", {class: "unseen", text}), ...parts);
  }

  /** Show which photos are selected, and where the cursor is. */
  #mark(tell = true) {
    for (const [row, cell] of this.cells) {
      const selected = this.selection.has(row), cursor = row === this.cursor;
      if (cell.selected === selected && cell.cursor === cursor) continue;
      cell.setAttribute("aria-selected", selected);
      cell.classList.toggle("cursor", cursor);
      Object.assign(cell, {selected, cursor});
    }
    if (this.cells.has(this.cursor)) this.element.setAttribute("aria-activedescendant", `${this.name}-${this.cursor}`);
    else this.element.removeAttribute("aria-activedescendant");
    if (tell) this.changed();
  }

  #point(row) {
    this.cursor = row;
    if (row === null) return;
    this.reveal(row);
    this.#render();
  }

  // --- keys ---

  /** What a key does to the grid: moving, selecting. */
  press(event) {
    if (event.altKey || !this.rows.length) return;
    const page = this.columns * Math.max(1, Math.floor(this.height / this.step));
    const jumps = {ArrowLeft: -1, ArrowRight: 1, ArrowUp: -this.columns, ArrowDown: this.columns, PageUp: -page, PageDown: page};
    const last = this.rows.length - 1;
    const here = this.places.get(this.cursor) ?? -1;
    if (event.key in jumps || event.key === "Home" || event.key === "End") {
      let there = event.key === "Home" ? 0 : event.key === "End" ? last : here < 0 ? this.#first() : here + jumps[event.key];
      if (["ArrowUp", "ArrowDown"].includes(event.key) && (there < 0 || (there > last &&
        Math.floor(here / this.columns) === Math.floor(last / this.columns)))) there = here;  // no row above or below
      this.#move(Math.min(last, Math.max(0, there)), event);
    } else if (event.key === " ") {
      if (this.selection.has(this.cursor)) this.selection.delete(this.cursor);
      else if (this.cursor !== null) this.selection.add(this.cursor);
      this.anchor = this.cursor;
      this.#mark();
    } else if (event.key === "a" && (event.ctrlKey || event.metaKey)) {
      this.selection = new Set(this.rows);
      this.#mark();
    } else if (event.key === "Escape" && this.selection.size) {
      this.selection.clear();
      this.#mark();
    } else {
      return;
    }
    event.preventDefault();
  }

  #move(place, {shiftKey, ctrlKey, metaKey}) {
    const row = this.rows[place];
    if (shiftKey) this.#range(row);
    else if (!ctrlKey && !metaKey) {
      this.selection = new Set([row]);
      this.anchor = row;
    }
    this.#point(row);
    this.#mark();
  }

  #range(row) {
    const a = this.places.get(this.anchor) ?? this.places.get(row), b = this.places.get(row);
    this.selection = new Set(this.rows.slice(Math.min(a, b), Math.max(a, b) + 1));
    this.anchor ??= row;
  }

  // --- mouse and touch ---

  #mouse() {
    let start = null;  // where the button went down, in the space of the grid, and what was selected then
    const where = (event) => {
      const box = this.space.getBoundingClientRect();
      return [event.clientX - box.left, event.clientY - box.top];
    };
    const rowAt = ([x, y]) => {
      const column = Math.floor((x - PAD) / this.step), line = Math.floor((y - PAD) / this.step);
      return column < 0 || column >= this.columns || line < 0 ? undefined : this.rows[line * this.columns + column];
    };
    this.element.addEventListener("pointerdown", (event) => {
      if (event.button !== 0 || event.pointerType === "touch" || event.target === this.element && event.offsetX > this.element.clientWidth) return;
      start = {at: where(event), dragged: false, before: event.ctrlKey || event.metaKey || event.shiftKey ? new Set(this.selection) : new Set()};
      this.element.setPointerCapture(event.pointerId);
    });
    const drag = (event) => {
      const [x, y] = where(event), [x0, y0] = start.at;
      if (!start.dragged && Math.hypot(x - x0, y - y0) < 6) return;
      start.dragged = true;
      const [left, right, top, bottom] = [Math.min(x, x0), Math.max(x, x0), Math.min(y, y0), Math.max(y, y0)];
      Object.assign(this.band.style, {left: `${left}px`, top: `${top}px`, width: `${right - left}px`, height: `${bottom - top}px`});
      this.band.hidden = false;
      this.selection = new Set(start.before);
      const low = (v) => Math.max(0, Math.floor((v - PAD + GAP) / this.step)), high = (v) => Math.floor((v - PAD) / this.step);
      for (let line = low(top); line <= high(bottom); line++) {
        for (let column = low(left); column <= Math.min(high(right), this.columns - 1); column++) {
          const row = this.rows[line * this.columns + column];
          if (row === undefined) continue;
          this.selection.add(row);
          this.cursor = row;
        }
      }
      this.#mark();
    };
    let pointer = null, scrolling = 0;
    const roll = () => {  // at the edge the grid goes on by itself
      scrolling = 0;
      if (!start || !start.dragged) return;
      const box = this.element.getBoundingClientRect();
      const by = pointer.clientY < box.top + 24 ? -12 : pointer.clientY > box.bottom - 24 ? 12 : 0;
      if (!by) return;
      this.element.scrollTop += by;
      drag(pointer);
      scrolling = requestAnimationFrame(roll);
    };
    this.element.addEventListener("pointermove", (event) => {
      if (!start) return;
      pointer = event;
      drag(event);
      if (!scrolling) scrolling = requestAnimationFrame(roll);
    });
    const end = (event) => {
      if (!start) return;
      const {dragged} = start;
      start = null;
      this.band.hidden = true;
      if (dragged) this.anchor = this.cursor;
      else if (event.type === "pointerup") this.#click(rowAt(where(event)), event);
    };
    this.element.addEventListener("pointerup", end);
    this.element.addEventListener("pointercancel", end);
    this.element.addEventListener("click", (event) => {
      if (event.pointerType !== "touch") return;
      this.#click(rowAt(where(event)), {ctrlKey: true});  // a finger has no Ctrl: each tap adds or takes away
    });
    this.element.addEventListener("dblclick", (event) => {
      const row = rowAt(where(event));
      if (row !== undefined) this.open(row);
    });
  }

  #click(row, {shiftKey, ctrlKey, metaKey}) {
    if (row === undefined) {
      if (!ctrlKey && !metaKey && !shiftKey) this.selection.clear();
    } else if (shiftKey) {
      this.#range(row);
      this.cursor = row;
    } else {
      if (ctrlKey || metaKey) {
        if (this.selection.has(row)) this.selection.delete(row);
        else this.selection.add(row);
      } else {
        this.selection = new Set([row]);
      }
      this.cursor = this.anchor = row;
    }
    this.#mark();
  }
}
