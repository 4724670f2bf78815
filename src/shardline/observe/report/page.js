"use strict";
// Draws the charts of a run report: lines, stacked areas and bars, as SVG of the width that there is.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const NS = "http://www.w3.org/2000/svg";
  const color = (i) => `var(--c${i % 6})`;

  function node(name, attributes, parent, text) {
    const made = document.createElementNS(NS, name);
    for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
    if (text !== undefined) made.textContent = text;
    if (parent) parent.appendChild(made);
    return made;
  }

  function label(value, unit) {
    if (value === 0) return "0";
    const size = Math.abs(value);
    if (unit === "B") {
      const units = ["B", "KiB", "MiB", "GiB", "TiB"];
      let at = 0, count = value;
      while (Math.abs(count) >= 1024 && at < 4) { count /= 1024; at += 1; }
      return `${+count.toPrecision(3)} ${units[at]}`;
    }
    if (unit === "s") {
      if (size < 1e-3) return `${+(value * 1e6).toPrecision(3)} µs`;
      if (size < 1) return `${+(value * 1e3).toPrecision(3)} ms`;
      return `${+value.toPrecision(3)} s`;
    }
    if (size >= 1e6) return `${+(value / 1e6).toPrecision(3)}M`;
    if (size >= 1e4) return `${+(value / 1e3).toPrecision(3)}k`;
    if (size < 1e-3) return value.toExponential(1).replace("e-", "e−");
    return `${+value.toPrecision(4)}`;
  }

  function ticks(low, high, count, binary) {
    const base = binary ? 1024 ** Math.floor(Math.log(Math.max(high, 1)) / Math.log(1024)) : 1;
    const span = (high - low) / base || 1;
    const rough = span / count, power = 10 ** Math.floor(Math.log10(rough));
    const step = [1, 2, 2.5, 5, 10].map((f) => f * power).find((s) => s >= rough) * base;
    const found = [];
    for (let at = Math.ceil(low / step - 1e-9) * step; at <= high + step * 1e-6; at += step) {
      found.push(Math.abs(at) < step * 1e-9 ? 0 : at);
    }
    return found;
  }

  // The colour of each series; a faint one has that of the next, which it stands behind.
  function colors(series) {
    let at = 0;
    return series.map((one) => color(one.faint ? at : at++));
  }

  function legend(host, series) {
    if (series.length < 2) return;
    const box = document.createElement("div"), tints = colors(series);
    box.className = "legend";
    series.forEach((one, i) => {
      const item = document.createElement("span"), mark = document.createElement("i");
      mark.style.background = tints[i];
      if (one.faint) mark.style.opacity = 0.35;
      item.append(mark, one.name);
      box.append(item);
    });
    host.append(box);
  }

  function share(host, chart) { // one bar of parts
    const parts = chart.series.map((one) => [one.name, one.points[0][1]]);
    const total = parts.reduce((sum, [, value]) => sum + value, 0) || 1;
    const width = host.clientWidth, svg = node("svg", { height: 26, role: "img" }, host);
    let x = 0;
    parts.forEach(([, value], i) => {
      const w = (value / total) * width;
      node("rect", { x, y: 0, width: Math.max(0, w - 1.5), height: 26, fill: color(i), rx: 3 }, svg);
      x += w;
    });
    const box = document.createElement("div");
    box.className = "legend";
    box.style.marginTop = "8px";
    parts.forEach(([name, value], i) => {
      const item = document.createElement("span"), mark = document.createElement("i");
      mark.style.background = color(i);
      const percent = (100 * value) / total;
      item.append(mark, `${name} ${label(value, "s")}, ${value && percent < 1 ? "<1" : Math.round(percent)} %`);
      box.append(item);
    });
    host.append(box);
  }

  function bars(host, chart) { // one bar for each name
    const parts = chart.series.map((one) => [one.name, one.points[0][1]]);
    const width = host.clientWidth, room = 58, gap = 74;
    const most = Math.max(...parts.map(([, value]) => value)) || 1;
    const svg = node("svg", { height: 26 * parts.length, role: "img" }, host);
    parts.forEach(([name, value], i) => {
      const y = 26 * i, w = Math.max(2, (value / most) * (width - room - gap));
      node("text", { x: 0, y: y + 16 }, svg, name);
      node("rect", { x: room, y: y + 4, width: w, height: 17, rx: 3, fill: color(0) }, svg);
      node("text", { x: room + w + 8, y: y + 16 }, svg, label(value, chart.unit));
    });
  }

  function stacked(series) { // points as [x, low, high]
    const below = new Map();
    return series.map((one) => ({
      ...one,
      points: one.points.map(([x, y]) => {
        const low = below.get(x) || 0, high = low + (y || 0);
        below.set(x, high);
        return [x, high, low];
      }),
    }));
  }

  function quantile(values, share) {
    const sorted = [...values].sort((a, b) => a - b);
    return sorted[Math.min(sorted.length - 1, Math.floor(share * sorted.length))];
  }

  function lines(host, chart) {
    const areas = chart.kind === "areas", series = areas ? stacked(chart.series) : chart.series;
    legend(host, series);
    const hasBands = chart.bands.length > 0, width = host.clientWidth, height = width < 480 ? 214 : 252;
    const left = 58, right = 8, top = 22, bottom = 42;
    const xs = series.flatMap((one) => one.points.map(([x]) => x));
    const ys = series.flatMap((one) => one.points.map(([, y]) => y)).filter((y) => y !== null && (!chart.log || y > 0));
    if (!xs.length || !ys.length) return;
    let [x0, x1] = [Math.min(...xs), Math.max(...xs)];
    if (x0 === x1) { x0 -= 1; x1 += 1; }
    let low = Math.min(...ys), high = Math.max(...ys), isCut = false;
    if (ys.length > 60) { // a few outliers, such as the first step, do not decide the scale
      const cut = quantile(ys, 0.97), floor = quantile(ys, 0.5);
      isCut = high - floor > 3 * (cut - floor) && cut > floor;
      if (isCut) high = cut + 0.35 * (cut - floor);
    }
    if (chart.log) { low = Math.log2(low); high = Math.log2(high); }
    if (chart.zero || areas) low = Math.min(0, low);
    if (low === high) { low -= Math.abs(low) * 0.05 || 1; high += Math.abs(high) * 0.05 || 1; }
    if (!chart.zero && !areas) low -= (high - low) * 0.05;
    high += (high - low) * (hasBands ? 0.16 : 0.05); // the names of bands are above the curve
    const X = (x) => left + ((x - x0) / (x1 - x0)) * (width - left - right);
    const Y = (y) => top + (1 - ((chart.log ? Math.log2(y) : y) - low) / (high - low)) * (height - top - bottom);
    const svg = node("svg", { height, role: "img" }, host);
    const id = `clip-${Math.random().toString(36).slice(2)}`;
    const clip = node("clipPath", { id }, node("defs", {}, svg));
    node("rect", { x: left, y: 0, width: width - left - right + 4, height: height - bottom + 1 }, clip);
    for (const tick of ticks(low, high, 4, chart.unit === "B")) {
      const y = top + (1 - (tick - low) / (high - low)) * (height - top - bottom);
      if (y < top - 1) continue;
      node("line", { x1: left, x2: width - right, y1: y, y2: y, class: "grid" }, svg);
      node("text", { x: left - 8, y: y + 4, "text-anchor": "end" }, svg, label(chart.log ? 2 ** tick : tick, chart.unit));
    }
    node("text", { x: 0, y: 11 }, svg, chart.y);
    const most = `up to ${label(Math.max(...ys), chart.unit)}`;
    if (isCut) node("text", { x: width - right, y: 11, "text-anchor": "end" }, svg, `a few steps reach further, ${most}`);
    node("text", { x: (left + width - right) / 2, y: height - 4, "text-anchor": "middle" }, svg, chart.x);
    const unit = chart.x === "step" ? "" : "s";
    const every = ticks(x0, x1, Math.max(2, Math.floor(width / 110))).filter((t) => unit || (Number.isInteger(t) && xs.length > 1) || xs.includes(t));
    every.forEach((tick) => {
      node("text", { x: X(tick), y: height - bottom + 17, "text-anchor": "middle" }, svg, label(tick, unit));
    });
    node("line", { x1: left, x2: width - right, y1: height - bottom, y2: height - bottom, class: "base" }, svg);
    const plot = node("g", { "clip-path": `url(#${id})` }, svg);
    const kinds = [...new Set(chart.bands.map(([name]) => name))];
    chart.bands.forEach(([name, begin, end]) => {
      const from = Math.max(X(begin), left), w = Math.min(X(end), width - right) - from;
      if (w < 1) return;
      const fill = color(kinds.indexOf(name));
      node("rect", { x: from, y: top, width: w, height: height - top - bottom, fill, opacity: 0.1 }, plot);
      if (w > 7 * name.length) node("text", { x: from + 5, y: top + 13 }, plot, name);
    });
    chart.marks.forEach((x) => {
      node("line", { x1: X(x), x2: X(x), y1: top, y2: height - bottom, class: "base", "stroke-dasharray": "3 4" }, plot);
    });
    chart.skipped.forEach((x) => {
      node("line", { x1: X(x), x2: X(x), y1: height - bottom - 9, y2: height - bottom, class: "skipped" }, plot);
    });
    const tints = colors(series);
    series.forEach((one, i) => {
      const points = one.points.filter(([, y]) => y !== null && (!chart.log || y > 0));
      const path = points.map(([x, y], n) => `${n ? "L" : "M"}${X(x).toFixed(1)} ${Y(y).toFixed(1)}`).join("");
      if (points.length === 1) { // one step makes no line
        const [[x, y, base = y]] = points;
        if (areas) node("rect", { x: X(x) - 20, y: Y(y), width: 40, height: Y(base) - Y(y), fill: tints[i], opacity: 0.82 }, plot);
        else node("circle", { cx: X(x), cy: Y(y), r: 3.5, fill: tints[i] }, plot);
        return;
      }
      if (areas) {
        const back = [...points].reverse().map(([x, , y]) => `L${X(x).toFixed(1)} ${Y(y).toFixed(1)}`).join("");
        node("path", { d: `${path}${back}Z`, fill: tints[i], opacity: 0.82 }, plot);
        return;
      }
      const own = tints[i];
      node("path", {
        d: path, fill: "none", stroke: own, "stroke-width": one.faint ? 1 : 1.9,
        opacity: one.faint ? 0.35 : 1, "stroke-linejoin": "round",
      }, plot);
      if (one.dots && points.length < 60) {
        points.forEach(([x, y]) => node("circle", { cx: X(x), cy: Y(y), r: 2.8, fill: own }, plot));
      }
    });
    hover(host, svg, chart, { X, left, right, top, bottom, width, height, x0, x1 });
  }

  function hover(host, svg, chart, at) {
    const tip = document.createElement("div");
    tip.className = "tip";
    host.append(tip);
    const cross = node("line", { y1: at.top, y2: at.height - at.bottom, class: "base", visibility: "hidden" }, svg);
    const nearest = (points, x) => points.reduce((best, p) => (Math.abs(p[0] - x) < Math.abs(best[0] - x) ? p : best));
    svg.addEventListener("pointermove", (event) => {
      const box = svg.getBoundingClientRect(), inside = event.clientX - box.left;
      const x = at.x0 + ((inside - at.left) / (at.width - at.left - at.right)) * (at.x1 - at.x0);
      if (x < at.x0 || x > at.x1) { leave(); return; }
      const longest = chart.series.reduce((a, b) => (b.points.length > a.points.length ? b : a));
      const here = nearest(longest.points, x)[0];
      tip.textContent = "";
      const head = document.createElement("b");
      head.textContent = chart.x === "step" ? `step ${Math.round(here)}` : label(here, "s");
      tip.append(head);
      chart.series.forEach((one) => {
        if (!one.points.length) return;
        const [, y] = nearest(one.points, here), row = document.createElement("div");
        row.textContent = `${one.name}  ${y === null ? "not finite" : label(y, chart.unit)}`;
        tip.append(row);
      });
      cross.setAttribute("x1", at.X(here));
      cross.setAttribute("x2", at.X(here));
      cross.setAttribute("visibility", "visible");
      tip.style.display = "block";
      tip.style.top = `${svg.offsetTop || host.querySelector("svg").getBoundingClientRect().top - host.getBoundingClientRect().top + 4}px`;
      const over = at.X(here) + 14 + tip.offsetWidth > at.width;
      tip.style.left = `${over ? at.X(here) - 14 - tip.offsetWidth : at.X(here) + 14}px`;
    });
    const leave = () => { tip.style.display = "none"; cross.setAttribute("visibility", "hidden"); };
    svg.addEventListener("pointerleave", leave);
  }

  function draw() {
    document.querySelectorAll("[data-chart]").forEach((host) => {
      const chart = data[host.dataset.chart];
      host.textContent = "";
      ({ share, bars, lines, areas: lines })[chart.kind](host, chart);
    });
  }

  let width = document.body.clientWidth;
  draw();
  window.addEventListener("resize", () => {
    if (document.body.clientWidth !== width) { width = document.body.clientWidth; requestAnimationFrame(draw); }
  });
})();
