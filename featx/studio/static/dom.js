// Making elements, and words for numbers. Names of files and classes are hostile: they only ever become text.

/** An element: `make("p", {class: "soft", text: name}, child, ...)`; `on` has listeners, the rest are attributes. */
export function make(tag, {class: kind, text, on, ...attributes} = {}, ...children) {
  const made = document.createElement(tag);
  if (kind) made.className = kind;
  if (text !== undefined) made.textContent = text;
  for (const [name, value] of Object.entries(attributes)) {
    if (value === true) made.setAttribute(name, "");
    else if (value !== false && value !== null && value !== undefined) made.setAttribute(name, value);
  }
  for (const [event, listener] of Object.entries(on || {})) made.addEventListener(event, listener);
  made.append(...children.filter((child) => child !== null && child !== undefined && child !== ""));
  return made;
}

/** An element of SVG. */
export function draw(tag, attributes = {}, ...children) {
  const made = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
  made.append(...children);
  return made;
}

export const button = (text, click, kind = "", attributes = {}) =>
  make("button", {type: "button", class: kind, text, on: {click}, ...attributes});

export const plural = (n, one = "photo", many = `${one}s`) => `${n.toLocaleString("en")} ${n === 1 ? one : many}`;

export const percent = (part) => `${Math.round(100 * part)}\u00a0%`;

export const interval = ({mean, low, high}) => `${percent(mean)} (${Math.round(100 * low)} to ${percent(high)})`;

export const likely = ({low, high}) => `most likely between ${Math.round(100 * low)} and ${percent(high)}`;

export function bytes(n) {
  if (n < 1e6) return `${Math.max(1, Math.round(n / 1e3))} kB`;
  return `${(n / 1e6).toFixed(n < 1e7 ? 1 : 0)} MB`;
}

export function duration(seconds) {
  if (seconds < 90) return `${Math.max(1, Math.round(seconds))} s`;
  return seconds < 5400 ? `${Math.round(seconds / 60)} min` : `${(seconds / 3600).toFixed(1)} h`;
}

/** What a view shows while it has nothing to show: one sentence, and what to do first. */
export const empty = (title, text, ...actions) =>
  make("div", {class: "empty"}, make("h2", {text: title}), make("p", {text}), ...actions);

/** What stands in the middle of such a view: the way to another step. */
export const leadTo = (step, text) => make("a", {class: "button primary", href: `#${step}`, text});

export const noPhotos = () => empty("No photos yet", "Choose a folder of photos first.", leadTo("photos", "Choose a folder"));

/** Do something once a frame, however often it is asked for. */
export function onceAFrame(work) {
  let asked = 0;
  return () => {
    asked ||= requestAnimationFrame(() => {
      asked = 0;
      work();
    });
  };
}

/** A dialog that takes itself away when it is closed, and gives the focus back. */
export function dialog(title, ...children) {
  const box = make("dialog", {"aria-label": title},
    make("form", {class: "dialog-head", method: "dialog"}, make("h2", {text: title}),
      make("button", {class: "quiet", "aria-label": "Close", text: "✕"})), ...children);
  const before = document.activeElement;
  box.addEventListener("close", () => {
    box.remove();
    if (before && before.isConnected) before.focus();
  });
  box.addEventListener("click", (event) => { if (event.target === box) box.close(); });
  document.body.append(box);
  box.showModal();
  return box;
}
