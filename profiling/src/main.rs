//! `memory-report`: shows and compares the memory reports of candle-ode.

fn main() {}
