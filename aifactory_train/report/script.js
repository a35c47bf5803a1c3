"use strict";
const readable = (figure) => {
  const svg = figure.querySelector("svg[data-points]");
  const slider = figure.querySelector("input[type=range]");
  const out = figure.querySelector("output");
  const cursor = figure.querySelector(".cursor");
  if (!svg || !slider) return;
  const points = svg.dataset.points.split(";").map((p) => p.split(",").map(Number));
  const unit = figure.querySelector(".unit").textContent;
  const show = (i) => {
    const p = points[i];
    cursor.setAttribute("x1", p[2]);
    cursor.setAttribute("x2", p[2]);
    const text = "step " + p[0].toLocaleString("en") + ": " + p[1] + (unit ? " " + unit : "");
    out.textContent = text;
    slider.setAttribute("aria-valuetext", text);
  };
  slider.addEventListener("input", () => show(+slider.value));
  svg.addEventListener("pointermove", (event) => {
    const box = svg.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * svg.viewBox.baseVal.width;
    let best = 0;
    for (let i = 1; i < points.length; i++) if (Math.abs(points[i][2] - x) < Math.abs(points[best][2] - x)) best = i;
    slider.value = best;
    show(best);
  });
  show(+slider.value);
};
document.querySelectorAll(".chart").forEach(readable);
document.addEventListener("aifactory:chart", (event) => readable(event.target));
window.addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((d) => (d.open = true)));
