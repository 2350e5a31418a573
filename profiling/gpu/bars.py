"""Our F16 step against our F32 step and against rampde's in fp16: `python bars.py FOLDER` of ours.jsonl and peers.jsonl."""
import json, sys
from pathlib import Path


def rows(name):
    path = Path(sys.argv[1]) / name
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def find(rows, **wanted):
    return next((row for row in rows if all(row.get(key) == value for key, value in wanted.items())), {})


def ratio(a, b, key, other):
    return f"{a[key] / b[other]:.3f}" if a.get(key) and b.get(other) else "-"


ours, peers = rows("ours.jsonl"), rows("peers.jsonl")
print("| work | batch | time: F16 of F32 (bar 0.55) | of rampde fp16 (0.5) | peak: of rampde fp16 (0.5) | of F32 | without our kernels |")
print("|---|---|---|---|---|---|---|")
for work, batch in dict.fromkeys((row["work"], row["batch"]) for row in ours if "loss" not in row):
    at = dict(work=work, batch=batch)
    half, single = (find(ours, **at, precision=p, cuda_kernels=True) for p in ("f16", "f32"))
    off, rampde = find(ours, **at, precision="f16", cuda_kernels=False), find(peers, **at, precision="f16", peer="rampde")
    cells = [ratio(half, single, "wall_s", "wall_s"), ratio(half, rampde, "wall_s", "wall_s"),
             ratio(half, rampde, "pool_peak_mib", "peak_mib"), ratio(half, single, "pool_peak_mib", "pool_peak_mib"),
             ratio(half, off, "wall_s", "wall_s")]
    print("|", work, "|", batch or "its own", "|", " | ".join(cells), "|")
for row in peers:
    if "failed" in row:
        print(f"\nnot measured: {row['peer']} on {row['work']} in {row['precision']}: {row['failed']}")
