// The spans of a report, from the packed table that its JSON has (its schema says how they are packed).

/** Objects with the fields of the table's columns; what a span lacks is null. */
async function spansOf({ count, names, columns }) {
  const packed = Uint8Array.from(atob(columns), character => character.charCodeAt(0));
  const inflated = new Blob([packed]).stream().pipeThrough(new DecompressionStream("deflate-raw"));
  const bytes = new Uint8Array(await new Response(inflated).arrayBuffer());
  const flags = bytes.subarray(0, count);
  let at = count;
  const unsigned = () => {
    let value = 0, scale = 1, byte;
    do {
      byte = bytes[at++];
      value += (byte & 127) * scale;
      scale *= 128;
    } while (byte >= 128);
    return value;
  };
  const signed = () => {
    const value = unsigned();
    return value % 2 === 0 ? value / 2 : -(value + 1) / 2;
  };
  const spans = Array.from(flags, flag => ({ parent: null, index: null, t: null, h: null, open: (flag & 16) !== 0 }));
  const every = act => spans.forEach(act);
  const flagged = (flag, act) => spans.forEach((span, n) => { if (flags[n] & flag) act(span); });
  every(span => { [span.target, span.name] = names[unsigned()]; });
  for (const name of ["id", "start_ns", "live_before"]) {
    let before = 0;
    every(span => { span[name] = before += signed(); });
  }
  for (const name of ["live_after", "peak"]) every(span => { span[name] = span.live_before + signed(); });
  every(span => { span.duration_ns = unsigned(); });
  every(span => { span.thread = unsigned(); });
  flagged(1, span => { span.parent = span.id - signed(); });
  flagged(2, span => { span.index = unsigned(); });
  const view = new DataView(bytes.buffer), number = new DataView(new ArrayBuffer(8));
  for (const [flag, name] of [[4, "t"], [8, "h"]]) {
    number.setBigUint64(0, 0n);
    flagged(flag, span => {
      number.setBigUint64(0, number.getBigUint64(0, true) ^ view.getBigUint64(at, true), true);
      at += 8;
      span[name] = number.getFloat64(0, true);
    });
  }
  return spans;
}

/** The passes with their steps: `spans` are in order of time, and a parent's number is smaller than its children's. */
function passesOf(spans, completeFrom) {
  const byId = new Map(spans.map(span => [span.id, span])), passes = new Map();
  const ours = (span, ...names) => span.target === "candle_ode" && names.includes(span.name);
  for (const span of spans.filter(span => ours(span, "forward", "backward"))) {
    passes.set(span.id, { pass: span.name, span, complete: span.start_ns >= completeFrom, peak: span.peak, steps: [] });
  }
  for (const step of spans.filter(span => ours(span, "step"))) {
    let around = step;
    while (around && !passes.has(around.id)) around = around.parent !== null && around.parent < around.id ? byId.get(around.parent) : null;
    if (around) passes.get(around.id).steps.push(step);
  }
  return [...passes.values()];
}
