//! The progress bar, or a line now and then where there is no terminal.

use crate::metrics::Row;
use indicatif::{HumanBytes, ProgressBar, ProgressStyle};

/// How far a run is.
pub struct Progress {
    bar: ProgressBar,
}

impl Progress {
    /// A run of `total` iterations, `done` of which are behind it.
    pub fn new(done: u64, total: u64) -> Self {
        let bar = ProgressBar::new(total).with_position(done);
        let template = "{bar:32} {pos}/{len}  {msg}  {per_sec:>12}  {eta} left";
        bar.set_style(ProgressStyle::with_template(template).unwrap_or_else(|_| ProgressStyle::default_bar()));
        bar.reset_eta();
        Self { bar }
    }

    /// After an iteration.
    pub fn show(&mut self, row: &Row) {
        let peak = HumanBytes(row.peak_bytes);
        self.bar.set_message(format!("NLL {:.3} nats, peak {peak}", row.train_nll));
        self.bar.inc(1);
        if let Some(val_nll) = row.val_nll {
            let Row { iter, train_nll, .. } = row;
            let line = format!("{iter:>6}: NLL {train_nll:.3} on the batch, {val_nll:.4} on validation, peak {peak}");
            if self.bar.is_hidden() {
                println!("{line}");
            } else {
                self.bar.println(line);
            }
        }
    }

    /// At the end.
    pub fn finish(&self) {
        self.bar.finish_and_clear();
    }
}
