// The learning curve as a drawing: accuracy against labelled photos of each class, with its interval.

import {draw, make, percent} from "./dom.js";

const H = 260, LEFT = 52, RIGHT = 84, TOP = 14, BOTTOM = 44;

/** `points`: [{shots, mean, low, high, pixels}]; `chance`: accuracy of always naming the most frequent class. */
export function learningCurve(points, chance) {
  const W = matchMedia("(max-width: 40rem)").matches ? 390 : 560;  // so that its words can be read on a phone
  const most = Math.max(...points.map(({shots}) => shots)), least = Math.min(...points.map(({shots}) => shots));
  const bottom = Math.max(0, Math.floor(10 * Math.min(chance, ...points.map(({low, pixels}) => Math.min(low, pixels ?? 1))) - .01) / 10);
  const wide = Math.log2(most / least) || 1;
  const x = (shots) => LEFT + (W - LEFT - RIGHT) * Math.log2(shots / least) / wide;
  const y = (part) => TOP + (H - TOP - BOTTOM) * (1 - part) / (1 - bottom);
  const line = (some, key) => some.map((each) => `${x(each.shots)},${y(each[key])}`);
  const svg = draw("svg", {viewBox: `0 0 ${W} ${H}`, class: "curve", role: "img",
    "aria-label": `Learning curve: ${points.map(({shots, mean, low, high}) => `${shots} of each class ${percent(mean)}, ${percent(low)} to ${percent(high)}`).join("; ")}`});
  const text = (content, attributes) => {
    const made = draw("text", attributes);
    made.textContent = content;
    return made;
  };
  const by = bottom < .5 ? 2 : 1;
  for (let tenth = 10; tenth >= Math.round(10 * bottom); tenth -= by) {
    svg.append(draw("line", {class: "rule", x1: LEFT, x2: W - RIGHT, y1: y(tenth / 10), y2: y(tenth / 10)}),
      text(`${10 * tenth} %`, {x: LEFT - 8, y: y(tenth / 10) + 4, "text-anchor": "end"}));
  }
  for (const {shots} of points) svg.append(text(shots, {x: x(shots), y: H - BOTTOM + 18, "text-anchor": "middle"}));
  svg.append(text("labelled photos of each class", {x: (LEFT + W - RIGHT) / 2, y: H - 6, "text-anchor": "middle"}));
  svg.append(draw("line", {class: "chance", x1: LEFT, x2: W - RIGHT, y1: y(chance), y2: y(chance)}), text("guessing", {x: W - RIGHT + 8, y: y(chance) + 4}));
  svg.append(draw("polygon", {class: "range", points: [...line(points, "high"), ...line(points, "low").reverse()].join(" ")}));
  const withPixels = points.filter(({pixels}) => pixels !== null);
  if (withPixels.length) {
    svg.append(draw("polyline", {class: "pixels", points: line(withPixels, "pixels").join(" ")}));
    const end = withPixels.at(-1);
    const near = Math.abs(y(end.pixels) - y(chance)) < 14 ? (end.pixels >= chance ? -12 : 12) : 0;
    svg.append(text("pixels only", {x: x(end.shots) + 8, y: y(end.pixels) + 4 + near}));
  }
  svg.append(draw("polyline", {class: "main", points: line(points, "mean").join(" ")}));
  for (const {shots, mean} of points) svg.append(draw("circle", {class: "dot", cx: x(shots), cy: y(mean), r: 4}));
  svg.append(text(percent(points.at(-1).mean), {class: "strong", x: x(points.at(-1).shots) + 8, y: y(points.at(-1).mean) + 4}));
  return svg;
}

/** A bar from 0 to 100 % with the interval as a whisker; its text stands beside it. */
export function bar({mean, low, high}, label) {
  const track = make("div", {class: "track", role: "img", "aria-label": `${label}: ${percent(mean)}, ${percent(low)} to ${percent(high)}`});
  const fill = make("div", {class: "fill"}), range = make("div", {class: "whisker"});
  fill.style.width = `${100 * mean}%`;
  range.style.left = `${100 * low}%`;
  range.style.width = `${100 * (high - low)}%`;
  track.append(fill, range);
  return track;
}
