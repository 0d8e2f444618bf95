// Try: a new photo, from a file or the camera: its label, why, its neighbours; one click corrects it and adds it.

import {post, send} from "./api.js";
import {button, empty, leadTo, make, noPhotos, percent} from "./dom.js";
import {swatch} from "./palette.js";
import {classNumbers, nameOf, on, say, store, thumb} from "./store.js";

export function build(section) {
  const files = make("input", {type: "file", accept: "image/*", multiple: true, hidden: true, on: {change: () => { take([...files.files]); files.value = ""; }}});
  const video = make("video", {autoplay: true, muted: true, playsinline: true, "aria-label": "What the camera sees"});
  const camera = make("div", {class: "camera", hidden: true}, video, make("div", {class: "row"}, button("Take the photo", shoot, "primary"), button("Close the camera", close)));
  const drop = make("button", {type: "button", class: "drop", on: {click: () => files.click()}}, make("strong", {text: "Choose new photos"}), ", drop them here, or paste one",
    make("small", {text: "Photos that are not in your folder, to see what the classifier says. They are kept only if you add them."}));
  const snap = button("Use the camera", start);
  const tries = make("ul", {class: "tries", "aria-label": "Tried photos", "aria-live": "polite"});
  const work = make("div", {class: "sheet narrow"}, drop, files, snap, camera, tries), first = make("div");
  section.append(first, work);
  let stream = null, queue = Promise.resolve();

  // --- taking photos in ---

  function take(given) {
    for (const file of given) {
      const image = make("img", {alt: file.name, src: URL.createObjectURL(file), on: {error: () => { image.after("cannot be shown"); picture.classList.add("gone"); seen(picture); }}});
      const card = make("li", {class: "card try"}), picture = make("div", {class: "layers"}, image), told = make("div", {class: "told"});
      told.append(make("h2", {text: "…"}), make("p", {class: "soft small", text: file.name}));
      card.append(picture, told);
      tries.prepend(card);
      queue = queue.then(() => ask(file, card, picture, told));
    }
  }

  async function ask(file, card, picture, told) {
    const title = told.firstChild;
    title.textContent = "Looking …";
    try {
      show(await send("/api/try", file), card, picture, told);
    } catch (error) {
      title.textContent = error.reason === "not_ready" ? "Not ready yet" : "This photo could not be tried";
      told.append(make("p", {class: error.reason === "not_ready" ? "warn" : "bad", text: error.message}), button("Try again", () => {
        while (told.children.length > 2) told.lastChild.remove();
        queue = queue.then(() => ask(file, card, picture, told));
      }));
    }
  }

  function show(answer, card, picture, told) {
    const {id, label, reason, probabilities, overlay, overlay_reason: noOverlay, neighbours, caution} = answer;
    picture.dataset.id = id;
    seen(picture);
    const all = Object.entries(probabilities).sort((a, b) => b[1] - a[1]), number = store.classes.indexOf(label);
    told.firstChild.textContent = reason === "unknown" ? "Unknown" : reason === "unsure" ? `Not sure: perhaps ${label}` : label;
    if (reason === "unknown") told.append(make("p", {class: "abstains", text: `Unlike the photos that you labelled: it may show none of your classes. If it had to answer: ${label}.`}));
    else if (reason === "unsure") told.append(make("p", {class: "abstains", text: caution || "Too uncertain to answer reliably."}));
    const bars = make("div", {class: "bars"});
    for (const [name, value] of all.slice(0, 5)) {
      const fill = make("div", {class: "fill"});
      fill.style.width = `${100 * value}%`;
      bars.append(make("span", {class: "who"}, swatch(store.classes.indexOf(name)), make("span", {text: name})),
        make("div", {class: "track", role: "img", "aria-label": `${name}: ${percent(value)}`}, fill), make("span", {class: "value", text: percent(value)}));
    }
    told.append(bars);
    if (overlay) {
      const layer = make("img", {src: overlay, alt: `Where the evidence for ${label} lies`, class: "overlay"});
      picture.append(layer);
      picture.classList.add("why");
      const why = make("label", {class: "small"}, make("input", {type: "checkbox", role: "switch", checked: true, on: {change: (event) => {
        layer.hidden = !event.target.checked;
        picture.classList.toggle("why", event.target.checked);
      }}}), " Show why: orange places speak for it, blue ones against it");
      told.append(make("p", {}, why));
    } else if (noOverlay) told.append(make("p", {class: "soft small", text: noOverlay}));
    told.append(correct(id, number >= 0 ? label : null));
    if (neighbours && neighbours.length) {
      card.append(make("div", {class: "near"}, make("h3", {class: "soft small", text: "Most similar photos of yours"}), make("ul", {}, ...neighbours.map(({row, label: name, score}) =>
        make("li", {title: store.ids[row] || ""}, make("img", {src: thumb(row), alt: store.ids[row] || ""}), make("span", {text: name ?? "not labelled"}), make("span", {class: "soft", text: `similarity ${score.toFixed(2)}`}))))));
    }
  }

  /** Show what the server made of a photo in a format that this browser does not know, such as HEIC. */
  function seen(picture) {
    const {id} = picture.dataset;
    if (!id || !picture.classList.contains("gone")) return;
    const image = picture.firstChild, shown = make("img", {alt: image.alt, on: {load: () => {
      picture.classList.remove("gone");
      image.nextSibling.remove();
      image.replaceWith(shown);
    }}});
    shown.src = `/tried/${encodeURIComponent(id)}`;
  }

  /** The row of buttons that adds the photo with its right label. */
  function correct(id, guess) {
    const box = make("div", {class: "correct", role: "group", "aria-label": "Add it with its right label"}, make("p", {class: "small", text: "What is it? One click adds it to your photos:"}));
    const field = make("input", {type: "text", placeholder: "another class", "aria-label": "Another class", maxlength: "100", list: "class-names", autocomplete: "off"});
    const add = async (given) => {
      const name = classNumbers().map(nameOf).find((each) => each.toLowerCase() === given.toLowerCase()) || given;
      if (!name) return;
      for (const each of box.querySelectorAll("button, input")) each.disabled = true;
      try {
        await post("/api/try/add", {id, name});
        box.replaceChildren(make("p", {class: "good", text: `Added as ${name}. The classifier learns from it.`}));
        say(`1 photo added: ${name}.`, {undo: true});
      } catch (error) {
        for (const each of box.querySelectorAll("button, input")) each.disabled = false;
        say(error.message, {bad: true});
      }
    };
    const names = classNumbers().map(nameOf);
    const shown = [guess, ...names.filter((name) => name !== guess)].filter((name) => name !== null).slice(0, 9);
    box.append(make("div", {class: "row"}, ...shown.map((name) => button(name, () => add(name), name === guess ? "primary" : "")),
      make("form", {class: "row", on: {submit: (event) => { event.preventDefault(); add(field.value.trim()); }}}, field, make("button", {text: "Add"}))));
    return box;
  }

  // --- dropped, pasted, from the camera ---

  section.addEventListener("dragover", (event) => { event.preventDefault(); drop.classList.add("over"); });
  section.addEventListener("dragleave", () => drop.classList.remove("over"));
  section.addEventListener("drop", (event) => {
    event.preventDefault();
    event.stopPropagation();
    drop.classList.remove("over");
    if (!work.hidden) take([...event.dataTransfer.files]);
  });
  document.addEventListener("paste", (event) => {
    const pasted = [...(event.clipboardData?.files || [])];
    if (section.hidden || work.hidden || !pasted.length) return;
    event.preventDefault();
    take(pasted);
  });

  async function start() {
    try {
      stream = await navigator.mediaDevices.getUserMedia({video: {facingMode: "environment", width: {ideal: 1280}}});
    } catch (error) {
      say(error.name === "NotAllowedError" ? "The browser does not let this page use the camera: allow it beside the address." : "No camera was found on this machine.", {bad: true});
      return;
    }
    video.srcObject = stream;
    camera.hidden = false;
    snap.hidden = true;
    camera.querySelector("button").focus();
  }

  function shoot() {
    const canvas = make("canvas");
    canvas.width = video.videoWidth;
    canvas.height = video.videoHeight;
    canvas.getContext("2d").drawImage(video, 0, 0);
    const name = `camera ${new Date().toISOString().slice(0, 19).replaceAll(":", ".")}.jpg`;
    canvas.toBlob((blob) => take([new File([blob], name, {type: "image/jpeg"})]), "image/jpeg", .92);
  }

  function close() {
    for (const track of stream?.getTracks() || []) track.stop();
    stream = null;
    camera.hidden = true;
    snap.hidden = false;
  }

  function settle() {
    const {open, suggestions} = store.state || {};
    const ready = Boolean(open && suggestions.ready);
    work.hidden = !ready && !tries.firstChild;
    first.replaceChildren(...(work.hidden ? [!open
      ? noPhotos()
      : empty("Nothing to try yet", suggestions.reason || "Label a few photos of two classes first.", leadTo("label", "Label"))] : []));
  }

  addEventListener("hashchange", () => { if (location.hash !== "#try") close(); });  // the camera is on only where it is seen
  on("opened", () => tries.replaceChildren());
  on("suggestions loaded state", () => { if (!section.hidden) settle(); });

  return {show: settle};
}
