// Draws a comparison: a table, overlaid curves, small multiples.

const sides = DATA.sides;
const kinds = [...new Set(sides.flatMap(side => Object.keys(side.timeline.bytes)))].filter(kind => kind !== "baseline").sort((a, b) => kindColour(a) - kindColour(b));
const sum = (side, chosen) => side.timeline.time_ns.map((_, n) => chosen.reduce((all, kind) => all + (side.timeline.bytes[kind]?.[n] ?? 0), 0));

byId("figures").append(table(
  ["report", ...DATA.metrics.flatMap(metric => [metric.title, "ratio"])],
  sides.map(side => [side.name, ...side.figures.flatMap(({ value, words, ratio }) =>
    [element("td", { "data-value": value }, words ?? "-"), ratio === null ? "-" : ratio.toFixed(3)])])));
document.querySelector("header").append(lookButton());

const widest = Math.max(1, ...sides.map(side => kinds.reduce((all, kind) => all + Math.max(side.at_peak.bytes[kind] ?? 0, 0), 0)));
for (const side of sides) {
  const bar = element("div", { class: "bar" });
  for (const kind of kinds) {
    const part = Math.max(side.at_peak.bytes[kind] ?? 0, 0);
    if (part > 0) bar.append(element("span", { style: `width:${100 * part / widest}%;background:${colour(kindColour(kind))}`, title: `${kind}: ${bytes(part)}` }));
  }
  byId("made-of").append(element("p", {}, side.name), bar);
}
const legend = () => element("div", { class: "legend" }, ...kinds.map(kind => element("span", {}, swatch(kindColour(kind)), kind)));
byId("made-of").append(legend());

const longest = new View(0, Math.max(...sides.map(side => side.duration_ns)));
byId("overlaid").append(longest.tools());
curves(byId("overlaid"), longest, {
  label: "live bytes over time, all reports", x: duration, height: 320,
  series: sides.map((side, n) => ({ name: side.name, xs: side.timeline.time_ns, ys: sum(side, kinds), stepped: true, colour: n })),
});
byId("overlaid").append(element("div", { class: "legend" }, ...sides.map((side, n) => element("span", {}, swatch(n), side.name))));

const highest = Math.max(1, ...sides.map(side => sum(side, kinds).reduce((most, value) => Math.max(most, value), 0)));
for (const side of sides) {
  const host = element("div", {}, element("h3", {}, side.name));
  byId("multiples").append(host);
  const view = new View(0, side.duration_ns);
  const series = kinds.filter(kind => side.timeline.bytes[kind]).map((kind, n, all) => ({
    name: kind, xs: side.timeline.time_ns, ys: sum(side, all.slice(0, n + 1)), under: sum(side, all.slice(0, n)),
    says: side.timeline.bytes[kind], stepped: true, colour: kindColour(kind),
  }));
  curves(host, view, { label: `live bytes of ${side.name}`, x: duration, series, height: 150, atLeast: highest });
}
byId("multiples").after(legend());

const names = [...new Set(sides.flatMap(side => Object.keys(side.settings)))];
const said = value => (value === undefined ? "-" : typeof value === "string" ? value : JSON.stringify(value));
byId("settings").append(table(["setting", ...sides.map(side => side.name)], names.map(name => [name, ...sides.map(side => said(side.settings[name]))])));
document.documentElement.dataset.drawn = "yes";
