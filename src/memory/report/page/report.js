// Draws one memory report. Bytes are shown above the baseline of the first counter unless a label says otherwise.

const counter = DATA.counters[0] || { name: "nothing", baseline: 0, live: 0, peak: 0, synchronises: false };
const baseline = counter.baseline;
const above = count => count - baseline;
const ours = "candle_ode";
const spans = await spansOf(DATA.spans);
const passes = passesOf(spans, DATA.totals.complete_from_ns);
const label = span => (span.target === ours ? span.name : `${span.target}::${span.name}`);
const inTime = new View(0, Math.max(DATA.totals.duration_ns, 1));
const kinds = Object.keys(DATA.timeline.bytes).filter(kind => kind !== "baseline").sort((a, b) => kindColour(a) - kindColour(b));

function heading() {
  const { crate_version, candle_version, device, settings } = DATA.environment;
  byId("where").textContent = `candle-ode ${crate_version} on Candle ${candle_version}, ${device}`;
  byId("where").after(lookButton());
  const note = text => byId("notes").append(element("p", { class: "note" }, text));
  if (DATA.counters.some(counter => counter.synchronises)) {
    note("Readings waited for the device: the times say little about speed.");
  }
  if (DATA.totals.spans_dropped > 0) {
    note(`${DATA.totals.spans_dropped} of ${DATA.totals.spans} spans, the oldest, were dropped: curves and tree lack them.`);
  }
  if (settings.times) note(String(settings.times));
}

function totals() {
  const card = (id, title, value, words) =>
    element("div", { class: "card" }, element("span", { class: "faint" }, title), valued("output", value, words, { id }));
  byId("totals").append(
    card("peak", `Peak, ${counter.name}, above baseline`, above(counter.peak), bytes),
    card("baseline", "Baseline", baseline, bytes),
    card("live-at-end", "Live at the end, above baseline", above(counter.live), bytes),
    card("owned-peak", "Owned bytes, peak", DATA.totals.owned_peak, bytes),
    card("duration", "Recorded", DATA.totals.duration_ns, duration),
    card("span-count", "Spans", DATA.totals.spans, String));
}

function madeOf() {
  const { bytes: parts, time_ns } = DATA.at_peak;
  const shown = Object.entries(parts).filter(([kind]) => kind !== "baseline").sort((a, b) => b[1] - a[1]);
  const whole = shown.reduce((sum, [, part]) => sum + Math.max(part, 0), 0) || 1;
  const bar = element("div", { class: "bar" }), legend = element("div", { class: "legend" });
  for (const [kind, part] of shown) {
    const share = `${(100 * part / whole).toFixed(1)} %`, n = kindColour(kind);
    bar.append(element("span", { style: `width:${100 * Math.max(part, 0) / whole}%;background:${colour(n)}`, title: `${kind}: ${bytes(part)}, ${share}` }));
    legend.append(element("span", {}, swatch(n), `${kind} `, valued("output", part, bytes, { "data-part": kind }), element("span", { class: "faint" }, ` ${share}`)));
  }
  const rest = parts.baseline ?? 0;
  const when = `At ${duration(time_ns)}, beside ${bytes(rest)} that were live before and that nobody has announced.`;
  byId("made-of").append(bar, legend, element("p", { class: "faint" }, when));
}

function live() {
  const times = DATA.timeline.time_ns;
  const bands = passes.map(({ span }) => ({ from: span.start_ns, to: span.start_ns + span.duration_ns, text: span.name }));
  const marks = spans.filter(span => span.target === ours && span.name === "step").map(span => span.start_ns);
  const under = new Array(times.length).fill(0);
  // Codecs that share a trajectory are told apart.
  const parts = kinds.flatMap(kind => (kind === "trajectory" && DATA.trajectory.length > 1
    ? DATA.trajectory.map(({ codec, over_time }) => ({ kind, name: `trajectory/${codec}`, own: over_time }))
    : [{ kind, name: kind, own: DATA.timeline.bytes[kind] }]));
  const layers = parts.map(({ kind, name, own }) => {
    const from = under.slice();
    own.forEach((value, n) => { under[n] += value; });
    return { name, xs: times, ys: under.slice(), under: from, says: own, stepped: true, colour: kindColour(kind) };
  });
  const all = { name: "all", xs: times, ys: under, stepped: true, colour: 10 };
  byId("live").append(inTime.tools());
  const legend = element("div", { class: "legend" }, ...kinds.map(kind => element("span", {}, swatch(kindColour(kind)), kind)));
  curves(byId("live"), inTime, { label: "live bytes over time, by kind", x: duration, series: [...layers, all], bands, marks, height: 300 });
  byId("live").append(legend, element("p", { class: "faint" }, "Shaded: passes; thin lines: steps. Of each stretch of time the highest moment is drawn."));
}

/** Gives every span the row it is drawn in: below the spans of its thread that are open when it begins. */
function rows() {
  const open = new Map(), deepest = new Map();
  const places = spans.map(span => {
    const stack = open.get(span.thread) || open.set(span.thread, []).get(span.thread);
    while (stack.length && stack[stack.length - 1] <= span.start_ns) stack.pop();
    const depth = stack.length;
    stack.push(span.start_ns + span.duration_ns);
    deepest.set(span.thread, Math.max(deepest.get(span.thread) || 0, depth + 1));
    return depth;
  });
  const first = new Map();
  let next = 0;
  for (const thread of [...deepest.keys()].sort((a, b) => a - b)) {
    first.set(thread, next);
    next += Math.min(deepest.get(thread), 12) + 1;
  }
  return { count: next, row: spans.map((span, n) => first.get(span.thread) + Math.min(places[n], 11)), first };
}

function lanes() {
  if (spans.length === 0) { byId("lanes").textContent = "No spans were kept."; return; }
  const { count, row, first } = rows(), tall = 15, names = new Map();
  for (const span of spans) if (!names.has(label(span))) names.set(label(span), names.size);
  const height = count * tall + MARGIN.top + MARGIN.bottom;
  const draw = ({ context, x, width, margin, ink, range }) => {
    context.textAlign = "left";
    context.fillStyle = ink("faint");
    for (const [thread, at] of first) context.fillText(`thread ${thread}`, 4, margin.top + at * tall + 11);
    context.save();
    context.beginPath();
    context.rect(margin.left, 0, width - margin.left - margin.right, height);
    context.clip();
    const drawn = new Float64Array(count).fill(-Infinity);
    spans.forEach((span, n) => {
      const end = span.start_ns + span.duration_ns;
      if (end < range[0] || span.start_ns > range[1]) return;
      const left = x(span.start_ns), right = x(end);
      if (right - drawn[row[n]] < 0.5) return;
      drawn[row[n]] = right;
      const name = label(span), top = margin.top + row[n] * tall;
      context.fillStyle = ink(`c${names.get(name) % 12}`);
      context.fillRect(left, top, Math.max(right - left - 0.5, 0.5), tall - 2);
      if (right - left > 40) {
        const from = Math.max(left, margin.left) + 3;
        context.fillStyle = ink("paper");
        if (context.measureText(name).width < right - from) context.fillText(name, from, top + 10);
      }
    });
    context.restore();
  };
  const describe = (at, y) => {
    const wanted = Math.floor((y - MARGIN.top) / tall), near = (inTime.range[1] - inTime.range[0]) / 400;
    let found = null, nearest = Infinity;
    spans.forEach((span, n) => {
      if (row[n] !== wanted) return;
      const away = Math.max(span.start_ns - at, at - span.start_ns - span.duration_ns, 0);
      if (away <= near && away < nearest) { nearest = away; found = span; }
    });
    if (!found) return null;
    const { index, t, h, start_ns, duration_ns, live_before, live_after, peak } = found;
    const numbers = [["index", index], ["t", t], ["h", h]].filter(([, value]) => value !== null);
    return [label(found) + numbers.map(([name, value]) => ` ${name}=${value}`).join(""),
      `at ${duration(start_ns)} for ${duration(duration_ns)}`,
      `peak ${bytes(above(peak))}, live ${bytes(above(live_before))} → ${bytes(above(live_after))}`].join("\n");
  };
  plot(byId("lanes"), inTime, { label: "spans over time, by thread", x: duration, draw, describe, height });
}

function steps() {
  const host = byId("steps"), forwards = passes.filter(pass => pass.pass === "forward");
  const backwards = passes.filter(pass => pass.pass !== "forward");
  const count = Math.max(forwards.length, backwards.length);
  if (count === 0) { host.textContent = "No pass was recorded."; return; }
  const peak = n => Math.max(forwards[n]?.peak ?? 0, backwards[n]?.peak ?? 0);
  const all = Array.from({ length: count }, (_, n) => n);
  const highest = all.reduce((best, n) => (peak(n) > peak(best) ? n : best), 0);
  const choice = element("select", { "aria-label": "solve" },
    ...all.map(n => element("option", { value: n, selected: n === highest ? "" : null }, `solve ${n + 1} of ${count}, peak ${bytes(above(peak(n)))}`)));
  const area = element("div");
  host.append(element("div", { class: "tools" }, choice), area);
  const draw = () => {
    const chosen = [forwards, backwards].map(list => list[Number(choice.value)]).filter(pass => pass && pass.steps.length > 0);
    const series = chosen.map(pass => {
      const ordered = pass.steps.map((step, n) => [step.index ?? n, above(step.peak)]).sort((a, b) => a[0] - b[0]);
      return { name: pass.pass + (pass.complete ? "" : " (in part)"), xs: ordered.map(pair => pair[0]), ys: ordered.map(pair => pair[1]), colour: pass.pass === "forward" ? 0 : 1 };
    });
    const last = Math.max(1, ...series.map(line => line.xs[line.xs.length - 1]));
    const view = new View(0, last);
    area.replaceChildren(view.tools());
    curves(area, view, { label: "peak of each step", x: n => `step ${Math.round(n)}`, series, height: 220 });
    area.append(element("div", { class: "legend" }, ...series.map(line => element("span", {}, swatch(line.colour), line.name))));
  };
  choice.addEventListener("change", draw);
  draw();
}

function ledger() {
  const exact = value => valued("td", value, bytes);
  const row = (name, live, peak, at) => [name, exact(live), exact(peak), exact(at), String(peak)];
  const codecs = DATA.trajectory.map(({ codec, live, peak, at_peak }) => row(`trajectory/${codec}`, live, peak, at_peak));
  const rows = DATA.owned.flatMap(({ category, live, peak }) =>
    [row(category, live, peak, DATA.at_peak.bytes[category] ?? 0), ...(category === "trajectory" ? codecs : [])]);
  rows.push(["all together", exact(DATA.totals.owned_live), exact(DATA.totals.owned_peak), "", String(DATA.totals.owned_peak)]);
  byId("ledger").append(table(["owned bytes", "live at the end", "peak", "at the moment of the peak", "peak in bytes"], rows));
}

/** Spans of one name under one parent make a node. A parent is older than its children, so its number is smaller. */
function treeOf() {
  const root = { children: new Map() }, places = new Map();
  for (const span of spans.slice().sort((a, b) => a.id - b.id)) {
    const parent = (span.parent !== null && span.parent < span.id && places.get(span.parent)) || root, name = label(span);
    let node = parent.children.get(name);
    if (!node) {
      node = { name, count: 0, time: 0, inside: 0, peak: 0, growth: 0, children: new Map(), parent };
      parent.children.set(name, node);
    }
    node.count += 1;
    node.time += span.duration_ns;
    node.peak = Math.max(node.peak, span.peak);
    node.growth += span.live_after - span.live_before;
    if (parent !== root) parent.inside += span.duration_ns;
    places.set(span.id, node);
  }
  return root;
}

function tree() {
  const row = (tag, attributes, cells) => element(tag, { ...attributes, class: "row" }, ...cells.map(text => element("span", {}, text)));
  // Children are made when they are first seen: a deep tree costs what is looked at.
  const show = (host, node, depth) => {
    for (const child of [...node.children.values()].sort((a, b) => b.time - a.time)) {
      const cells = [child.count, duration(child.time), duration(Math.max(child.time - child.inside, 0)), bytes(above(child.peak)), bytes(child.growth)];
      const name = element("span", { class: "name", style: `padding-left:${Math.min(depth, 20) * 1.1}em` }, child.name);
      if (child.children.size === 0) {
        const leaf = row("div", {}, cells);
        leaf.prepend(name);
        host.append(element("div", { class: "leaf" }, leaf));
        continue;
      }
      const head = element("summary", {}), line = row("div", {}, cells), folded = element("details", {}, head);
      line.prepend(name);
      head.append(line);
      let filled = false;
      const fill = () => { if (!filled) { filled = true; show(folded, child, depth + 1); } };
      if (depth < 3) { fill(); folded.open = true; }
      folded.addEventListener("toggle", fill);
      host.append(folded);
    }
  };
  const host = element("div", { class: "tree" }, row("div", {}, ["span", "count", "time", "of its own", "highest peak", "live, net"]));
  show(host, treeOf(), 0);
  byId("tree").append(host);
}

function tables() {
  const counted = DATA.counters.map(({ name, baseline, live, peak }) =>
    [name, ...[baseline, live, peak, peak - baseline].map(value => valued("td", value, bytes))]);
  byId("counters").append(table(["counter", "baseline", "live at the end", "peak", "peak above baseline"], counted));
  const { crate_version, candle_version, device, settings } = DATA.environment;
  const said = value => (typeof value === "string" ? value : JSON.stringify(value));
  const rows = [["candle-ode", crate_version], ["Candle", candle_version], ["device", device], ...Object.entries(settings).map(([name, value]) => [name, said(value)])];
  byId("settings").append(table(["setting", "value"], rows));
}

heading();
totals();
madeOf();
live();
lanes();
steps();
ledger();
tree();
tables();
document.documentElement.dataset.drawn = "yes";
