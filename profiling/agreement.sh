#!/usr/bin/env bash
# Live bytes and peak of a fixed solve by the tracking allocator and by a malloc counter that is preloaded: prints both,
# and fails where they are more than one per cent apart. Needs glibc and a C compiler (CC, or cc).
set -euo pipefail
cd "$(dirname "$0")/.."
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
"${CC:-cc}" -O2 -Wall -Wextra -Werror -shared -fPIC -o "$folder/counter.so" profiling/examples/counter.c
cargo build --quiet --release --workspace --example agreement
# Every block from the heap proper: a block of its own mapping would be rounded up to whole pages.
GLIBC_TUNABLES=glibc.malloc.mmap_threshold=1073741824 LD_PRELOAD="$folder/counter.so" \
  "${CARGO_TARGET_DIR:-target}/release/examples/agreement"
