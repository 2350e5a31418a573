// What the pages of reports share: numbers in words, elements, and charts on a canvas that zoom together.

const DATA = JSON.parse(document.getElementById("data").textContent);
const byId = id => document.getElementById(id);
const colour = n => `var(--c${n % 12})`;

/** 1536 → "1.50 KiB", as the tool prints it. */
function bytes(count) {
  const sign = count < 0 ? "-" : "";
  let value = Math.abs(count), unit = 0;
  for (; value >= 1024 && unit < 4; unit++) value /= 1024;
  return sign + (unit === 0 ? `${value} B` : `${value.toFixed(2)} ${["KiB", "MiB", "GiB", "TiB"][unit - 1]}`);
}

/** 1500000 → "1.50 ms". */
function duration(ns) {
  if (ns < 1e3) return `${Math.round(ns)} ns`;
  if (ns < 1e6) return `${(ns / 1e3).toFixed(2)} µs`;
  if (ns < 1e9) return `${(ns / 1e6).toFixed(2)} ms`;
  return `${(ns / 1e9).toFixed(2)} s`;
}

/** An element: attributes by name, then children, which are elements or text. */
function element(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value !== undefined && value !== null) made.setAttribute(name, value);
  }
  made.append(...children.map(child => (child instanceof Node ? child : String(child))));
  return made;
}

/** A value in words that also says it exactly. */
const valued = (tag, value, words, attributes = {}) => element(tag, { ...attributes, "data-value": value }, words(value));

/** A table: heads are texts, rows are lists of cells (texts or <td>s). */
function table(heads, rows) {
  const cell = content => (content instanceof HTMLTableCellElement ? content : element("td", {}, content));
  const head = element("thead", {}, element("tr", {}, ...heads.map(text => element("th", {}, text))));
  const body = element("tbody", {}, ...rows.map(row => element("tr", {}, ...row.map(cell))));
  return element("div", { class: "scroll" }, element("table", {}, head, body));
}

/** Every kind of bytes has its colour, on every page. */
function kindColour(kind) {
  const known = ["trajectory", "stages", "cotangents", "gradients", "casts", "parameters", "optimizer", "scratch", "field", "pullback", "outside"];
  const place = known.indexOf(kind);
  return place < 0 ? known.length : place;
}

const swatch = n => element("span", { class: "swatch", style: `background:${colour(n)}` });

/** The part of an axis that is seen; charts that share one zoom together. */
class View {
  constructor(from, to) {
    this.full = [from, to > from ? to : from + 1];
    this.range = [...this.full];
    this.watchers = [];
  }
  show(from, to) {
    const [least, most] = this.full;
    const width = Math.min(Math.max(to - from, (most - least) * 1e-7), most - least);
    const start = Math.min(Math.max(from, least), most - width);
    this.range = [start, start + width];
    this.watchers.forEach(redraw => redraw());
  }
  /** Makes it `factor` times as wide around `at`, by default its middle. */
  zoom(factor, at = (this.range[0] + this.range[1]) / 2) {
    const [from, to] = this.range;
    this.show(at - (at - from) * factor, at + (to - at) * factor);
  }
  pan(part) {
    const [from, to] = this.range;
    this.show(from + (to - from) * part, to + (to - from) * part);
  }
  reset() { this.show(...this.full); }
  /** Buttons for those without a mouse. */
  tools() {
    const button = (text, label, act) => {
      const made = element("button", { type: "button", "aria-label": label, title: label }, text);
      made.addEventListener("click", act);
      return made;
    };
    return element("div", { class: "tools" },
      button("+", "zoom in", () => this.zoom(0.5)), button("−", "zoom out", () => this.zoom(2)),
      button("◂", "earlier", () => this.pan(-0.5)), button("▸", "later", () => this.pan(0.5)),
      button("all", "show all", () => this.reset()),
      element("span", { class: "faint" }, "drag to zoom, double click for all"));
  }
}

const MARGIN = { left: 76, right: 10, top: 10, bottom: 24 };

/** At most `count` round numbers from `from` to `to`; bytes are round in powers of two. */
function ticks(from, to, count, binary = false) {
  const raw = (to - from) / count || 1;
  let step = 2 ** Math.ceil(Math.log2(raw));
  if (!binary) {
    const ten = 10 ** Math.floor(Math.log10(raw));
    step = [1, 2, 5, 10].map(n => n * ten).find(n => n >= raw) || ten;
  }
  const found = [];
  for (let n = Math.ceil(from / step); n * step <= to && found.length <= count + 1; n++) found.push(n * step);
  return found;
}

/**
 * A canvas over a view. `chart.draw(pen)` draws, where pen = { context, x(value) → pixel, width, height, ink(name) };
 * `chart.describe(value, y)` says what is there, or nothing.
 */
function plot(host, view, chart) {
  const canvas = element("canvas", { tabindex: 0, role: "img", "aria-label": chart.label });
  const tip = element("div", { class: "tip", hidden: "" });
  const box = element("div", { class: "plot" }, canvas, tip);
  host.append(box);
  let selection = null, pointed = null;
  const margin = { ...MARGIN, ...chart.margin };
  const size = () => ({ width: canvas.clientWidth || 600, height: chart.height || 240 });
  const scale = () => {
    const { width } = size(), [from, to] = view.range, inner = Math.max(width - margin.left - margin.right, 1);
    return { x: v => margin.left + (v - from) / (to - from) * inner, value: p => from + (p - margin.left) / inner * (to - from) };
  };
  const draw = () => {
    const { width, height } = size(), dense = window.devicePixelRatio || 1;
    canvas.style.height = `${height}px`;
    canvas.width = Math.round(width * dense);
    canvas.height = Math.round(height * dense);
    const context = canvas.getContext("2d"), style = getComputedStyle(document.documentElement);
    const probe = element("span", { hidden: "" });
    document.body.append(probe);
    const known = {};
    const ink = name => known[name] ??= (probe.style.color = `var(--${name})`, getComputedStyle(probe).color);
    context.scale(dense, dense);
    context.font = `12px ${style.fontFamily || "sans-serif"}`;
    const { x } = scale(), [from, to] = view.range;
    context.strokeStyle = ink("line");
    context.fillStyle = ink("faint");
    context.textAlign = "center";
    for (const tick of ticks(from, to, Math.max(Math.floor(width / 130), 2))) {
      const text = chart.x(tick), most = width - context.measureText(text).width / 2 - 2;
      context.fillText(text, Math.min(Math.max(x(tick), margin.left), most), height - 6);
    }
    chart.draw({ context, x, width, height, margin, ink, range: view.range });
    if (pointed !== null && !selection) {
      context.strokeStyle = ink("faint");
      context.beginPath();
      context.moveTo(x(pointed), margin.top);
      context.lineTo(x(pointed), height - margin.bottom);
      context.stroke();
    }
    if (selection) {
      context.fillStyle = ink("band");
      context.fillRect(Math.min(...selection), margin.top, Math.abs(selection[1] - selection[0]), height - margin.top - margin.bottom);
    }
    probe.remove();
  };
  const place = event => {
    const bounds = canvas.getBoundingClientRect();
    return [event.clientX - bounds.left, event.clientY - bounds.top];
  };
  const point = (left, top) => {
    pointed = Math.min(Math.max(scale().value(left), view.range[0]), view.range[1]);
    const text = chart.describe(pointed, top, size());
    tip.hidden = !text;
    tip.textContent = text || "";
    tip.style.top = `${Math.max(top - 10 - tip.offsetHeight, 4)}px`;
    tip.style.left = `${Math.max(Math.min(left + 14, box.clientWidth - tip.offsetWidth - 4), 4)}px`;
    draw();
  };
  canvas.addEventListener("pointerdown", event => {
    const [left] = place(event);
    selection = [left, left];
    canvas.setPointerCapture(event.pointerId);
  });
  canvas.addEventListener("pointermove", event => {
    const [left, top] = place(event);
    if (selection) selection[1] = left;
    point(left, top);
  });
  canvas.addEventListener("pointerup", event => {
    const chosen = selection;
    selection = null;
    const [left, top] = place(event);
    if (chosen && Math.abs(chosen[1] - chosen[0]) > 6) {
      const { value } = scale();
      view.show(value(Math.min(...chosen)), value(Math.max(...chosen)));
    } else {
      point(left, top);
    }
  });
  canvas.addEventListener("pointercancel", () => { selection = null; draw(); });
  canvas.addEventListener("pointerleave", () => { pointed = null; tip.hidden = true; draw(); });
  canvas.addEventListener("dblclick", () => view.reset());
  canvas.addEventListener("wheel", event => {
    if (!event.ctrlKey && !event.shiftKey) return;
    event.preventDefault();
    view.zoom((event.deltaY || event.deltaX) > 0 ? 1.25 : 0.8, scale().value(place(event)[0]));
  }, { passive: false });
  canvas.addEventListener("keydown", event => {
    const act = { "+": () => view.zoom(0.5), "-": () => view.zoom(2), ArrowLeft: () => view.pan(-0.2), ArrowRight: () => view.pan(0.2), "0": () => view.reset() }[event.key];
    if (act) { event.preventDefault(); act(); }
  });
  view.watchers.push(draw);
  new ResizeObserver(draw).observe(box);
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", draw);
  document.addEventListener("look", draw);
  draw();
}

/** The last index whose value is at most `at`, or 0. */
function indexAt(values, at) {
  let low = 0, high = values.length;
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (values[middle] <= at) low = middle; else high = middle;
  }
  return low;
}

/**
 * Curves of bytes. `series`: { name, xs (rising), ys, colour (number), stepped (a value holds until the next), under (ys
 * to fill down to), says (values in words instead of ys) };
 * `bands`: { from, to, text } are shaded; `marks`: places of thin lines. x says a place on the axis in words. The
 * axis of bytes reaches `atLeast` so far.
 */
function curves(host, view, { label, x, series, bands = [], marks = [], height = 260, y = bytes, binary = true, atLeast = 1, margin }) {
  const highest = Math.max(atLeast, ...series.map(line => line.ys.reduce((most, value) => Math.max(most, value), 0)));
  const lowest = Math.min(0, ...series.map(line => line.ys.reduce((least, value) => Math.min(least, value), 0)));
  const top = highest + (highest - lowest) * 0.04;
  const draw = ({ context, x, width, height, margin, ink, range }) => {
    const level = value => height - margin.bottom - (value - lowest) / (top - lowest) * (height - margin.top - margin.bottom);
    context.textAlign = "right";
    for (const tick of ticks(lowest, top, Math.max(Math.floor(height / 50), 2), binary)) {
      context.fillStyle = ink("faint");
      context.fillText(y(tick), margin.left - 6, level(tick) + 4);
      context.strokeStyle = ink("line");
      context.beginPath();
      context.moveTo(margin.left, level(tick));
      context.lineTo(width - margin.right, level(tick));
      context.stroke();
    }
    context.save();
    context.beginPath();
    context.rect(margin.left, 0, width - margin.left - margin.right, height - margin.bottom + 1);
    context.clip();
    context.textAlign = "left";
    for (const band of bands.filter(band => band.to >= range[0] && band.from <= range[1])) {
      const left = Math.max(x(band.from), margin.left), right = Math.min(x(band.to), width - margin.right);
      context.fillStyle = ink("band");
      context.fillRect(left, margin.top, Math.max(right - left, 1), height - margin.top - margin.bottom);
      context.fillStyle = ink("faint");
      if (right - left > context.measureText(band.text).width + 6) context.fillText(band.text, left + 3, margin.top + 12);
    }
    const seen = marks.slice(indexAt(marks, range[0]), indexAt(marks, range[1]) + 1);
    if (seen.length < width / 4) {
      context.strokeStyle = ink("line");
      context.beginPath();
      for (const mark of seen) {
        context.moveTo(x(mark), margin.top);
        context.lineTo(x(mark), height - margin.bottom);
      }
      context.stroke();
    }
    for (const line of series) {
      if (line.xs.length === 0) continue;
      const first = indexAt(line.xs, range[0]), last = Math.min(indexAt(line.xs, range[1]) + 1, line.xs.length - 1);
      const path = new Path2D();
      let column = -Infinity, low = 0, high = 0, end = 0;
      // In each column of pixels its first, lowest, highest and last value are all that can be seen.
      const flush = () => {
        if (column === -Infinity) return;
        path.lineTo(column, level(low));
        path.lineTo(column, level(high));
        path.lineTo(column, level(end));
      };
      for (let n = first; n <= last; n++) {
        const at = x(line.xs[n]), value = line.ys[n];
        if (n === first) path.moveTo(at, level(value));
        if (at - column < 0.5) {
          low = Math.min(low, value);
          high = Math.max(high, value);
          end = value;
          continue;
        }
        flush();
        if (line.stepped && column !== -Infinity) path.lineTo(at, level(end));
        column = at;
        low = high = end = value;
      }
      flush();
      if (line.under) {
        for (let n = last; n >= first; n--) {
          if (line.stepped && n < last) path.lineTo(x(line.xs[n + 1]), level(line.under[n]));
          path.lineTo(x(line.xs[n]), level(line.under[n]));
        }
        path.closePath();
        context.globalAlpha = 0.75;
        context.fillStyle = ink(`c${line.colour % 12}`);
        context.fill(path);
        context.globalAlpha = 1;
        continue;
      }
      context.strokeStyle = ink(`c${line.colour % 12}`);
      context.lineWidth = 1.5;
      context.stroke(path);
      context.lineWidth = 1;
      if (last - first < width / 12) {
        context.fillStyle = context.strokeStyle;
        for (let n = first; n <= last; n++) context.fillRect(x(line.xs[n]) - 2, level(line.ys[n]) - 2, 4, 4);
      }
    }
    context.restore();
  };
  const describe = at => {
    const values = series.filter(line => line.xs.length > 0).map(line => {
      const before = indexAt(line.xs, at), after = Math.min(before + 1, line.xs.length - 1);
      const n = !line.stepped && Math.abs(line.xs[after] - at) < Math.abs(line.xs[before] - at) ? after : before;
      return `${line.name}: ${y(line.says ? line.says[n] : line.ys[n])}`;
    });
    return [x(at), ...bands.filter(band => band.from <= at && at <= band.to).map(band => band.text), ...values].join("\n");
  };
  plot(host, view, { label, x, draw, describe, height, margin });
}

/** Light, dark, or as the system has it. */
function lookButton() {
  const looks = ["", "light", "dark"];
  const button = element("button", { id: "look", type: "button", title: "light or dark" }, "◐");
  button.addEventListener("click", () => {
    const root = document.documentElement;
    root.className = looks[(looks.indexOf(root.className) + 1) % looks.length];
    document.dispatchEvent(new Event("look"));
  });
  return button;
}
