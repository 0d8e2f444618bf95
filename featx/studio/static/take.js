// Take it along: the model and its kin as files, and the commands that do the same.

import {post} from "./api.js";
import {button, bytes, empty, leadTo, likely, make, noPhotos, percent, plural} from "./dom.js";
import {on, read, say, store} from "./store.js";

const KINDS = [
  ["model", "Model file", "For featx: the command line, Python, or the service that names photos over the network."],
  ["html", "Web page", "One file that names photos in any browser, without internet. Send it to a colleague."],
  ["onnx", "ONNX", "For programs in other languages, and for phones."],
  ["card", "Model card", "What it was made from, how good it is and where it fails, to hand on with it."],
  ["labels", "Labels", "Your labels as a table (CSV), for a spreadsheet or for featx."],
];

export function build(section) {
  const list = make("div", {class: "takes"}), commands = make("section", {class: "card", "aria-label": "On the command line"});
  const lead = make("p", {class: "lead-in"}), first = make("div");
  const work = make("div", {class: "sheet"}, lead, list, commands);
  section.append(first, work);

  function put(job) {
    store.state.jobs = [...store.state.jobs.filter((each) => each.what !== job.what), job];
    draw();
  }

  async function produce(what) {
    const asked = {id: what, what, status: "running", message: "", file: "", bytes: null, made: null};
    put(asked);
    try {
      const job = await post("/api/take", {what});
      if (store.state.jobs.includes(asked)) put(job);  // else an event has told more meanwhile
    } catch (error) {
      put({...asked, status: "failed", message: error.message});
    }
  }

  function card([what, title, text]) {
    const job = store.state.jobs.find((each) => each.what === what);
    const made = make("section", {class: "card take", "aria-label": title}, make("h2", {text: title}), make("p", {class: "soft", text}));
    if (!job) made.append(button("Make it", () => produce(what), "", {"aria-label": `Make it: ${title}`}));
    else if (job.status === "running") made.append(make("div", {class: "row"}, make("progress", {"aria-label": `${title} is being made`}), make("span", {class: "small soft", text: job.message || "Working …"})));
    else if (job.status === "failed") made.append(make("p", {class: "bad", text: job.message || "It could not be made."}), button("Try again", () => produce(what), "", {"aria-label": `Try again: ${title}`}));
    else {
      made.append(make("div", {class: "row"},
        make("a", {class: "button primary", href: `/api/take/${encodeURIComponent(job.file)}`, download: job.file, text: "Download", "aria-label": `Download ${job.file}`}),
        button("Make it anew", () => produce(what), "quiet", {"aria-label": `Make it anew: ${title}`})),
      job.message ? make("p", {class: "warn", text: job.message}) : "",
      make("p", {class: "small soft", text: [job.file, job.bytes && bytes(job.bytes), job.made && `made ${new Date(1000 * job.made).toLocaleString([], {dateStyle: "medium", timeStyle: "short"})}`].filter(Boolean).join(" · ")}));
    }
    return made;
  }

  function draw() {
    const {state, quality} = store;
    const ready = Boolean(state && state.open && state.suggestions.ready);
    work.hidden = !ready;
    first.replaceChildren();
    if (!ready) {
      first.append(state && state.open
        ? empty("Nothing to take along yet", state.suggestions.reason || "Label a few photos of two classes first.", leadTo("label", "Label"))
        : noPhotos());
      return;
    }
    lead.textContent = `Your classifier, from ${plural(store.state.labelled, "label")}${quality && quality.accuracy ? `: ${percent(quality.accuracy.mean)} right, ${likely(quality.accuracy)}` : ""}.`;
    const focused = list.contains(document.activeElement) ? [...list.children].indexOf(document.activeElement.closest(".take")) : -1;
    list.replaceChildren(...KINDS.map(card));
    if (focused >= 0) list.children[focused].querySelector("a, button")?.focus();
  }

  async function tell() {
    if (work.hidden) return;
    const answer = await read("/api/commands");
    if (!answer) return;
    const text = answer.commands.join("\n");
    commands.replaceChildren(make("h2", {text: "The same on the command line"}), make("p", {class: "soft", text: "For a script, or to do it again next year:"}),
      make("pre", {tabindex: "0", text}), make("div", {class: "row"}, button("Copy", async () => {
        try {
          await navigator.clipboard.writeText(text);
          say("Copied.");
        } catch {
          getSelection().selectAllChildren(commands.querySelector("pre"));
          say("The browser did not allow it: the text is selected, press Ctrl+C.");
        }
      })), make("p", {class: "soft small", text: `On this machine, the files made here are in ${answer.files.models}, your labels in ${answer.files.labels}, and what the network saw in ${answer.files.store}.`}));
  }

  on("jobs quality loaded", () => { if (!section.hidden) draw(); });
  on("suggestions", () => {
    if (section.hidden || !work.hidden) return;
    draw();
    tell();
  });

  return {
    show() {
      draw();
      tell();
    },
  };
}
