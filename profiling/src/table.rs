//! Plain text: aligned columns, bytes and times with units.

/// Rows of cells under a head; the first column is flush left, the others right.
pub(crate) struct Table {
    rows: Vec<Vec<String>>,
}

impl Table {
    pub(crate) fn new<const N: usize>(head: [&str; N]) -> Self {
        Self::of(head.map(str::to_owned).to_vec())
    }

    /// With as many columns as it turns out to need.
    pub(crate) fn of(head: Vec<String>) -> Self {
        Self { rows: vec![head] }
    }

    pub(crate) fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.add(cells.to_vec());
    }

    pub(crate) fn add(&mut self, cells: Vec<String>) {
        self.rows.push(cells);
    }

    /// As a Markdown table.
    pub(crate) fn markdown(&self) -> String {
        let line = |cells: &[String]| {
            let cells: Vec<_> = cells.iter().map(|cell| cell.replace('|', "\\|")).collect();
            format!("| {} |\n", cells.join(" | "))
        };
        let mut lines = self.rows.iter().map(|row| line(row));
        let head = lines.next().unwrap_or_default();
        let columns = self.rows.first().map_or(0, Vec::len);
        let rule = format!("|---|{}\n", "---:|".repeat(columns.saturating_sub(1)));
        std::iter::once(head).chain(std::iter::once(rule)).chain(lines).collect()
    }

    pub(crate) fn text(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width =
            |column: usize| self.rows.iter().filter_map(move |row| row.get(column)).map(|cell| cell.chars().count());
        let widths: Vec<_> = (0..columns).map(|column| width(column).max().unwrap_or(0)).collect();
        let mut text = String::new();
        for row in &self.rows {
            let cells = row.iter().zip(&widths).enumerate().map(|(column, (cell, &width))| match column {
                0 => format!("{cell:<width$}"),
                _ => format!("{cell:>width$}"),
            });
            text.push_str("  ");
            text.push_str(cells.collect::<Vec<_>>().join("  ").trim_end());
            text.push('\n');
        }
        text
    }
}

/// `1536` → `1.50 KiB`; whole bytes below a kibibyte.
pub(crate) fn bytes(count: u64) -> String {
    let mut value = count as f64;
    let mut unit = "B";
    for larger in ["KiB", "MiB", "GiB", "TiB"] {
        if value < 1024.0 {
            break;
        }
        value /= 1024.0;
        unit = larger;
    }
    if unit == "B" { format!("{count} B") } else { format!("{value:.2} {unit}") }
}

/// `count` as the bytes above `baseline`; below it with a minus.
pub(crate) fn above(count: u64, baseline: u64) -> String {
    let difference = bytes(count.abs_diff(baseline));
    if count < baseline { format!("-{difference}") } else { difference }
}

/// `1_500_000` → `1.50 ms`.
pub(crate) fn time(nanoseconds: u64) -> String {
    let value = nanoseconds as f64;
    match nanoseconds {
        0..1_000 => format!("{nanoseconds} ns"),
        1_000..1_000_000 => format!("{:.2} µs", value / 1e3),
        1_000_000..1_000_000_000 => format!("{:.2} ms", value / 1e6),
        _ => format!("{:.2} s", value / 1e9),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn units_change_at_their_bounds() {
        assert_eq!([0, 1023, 1024, 1536].map(bytes), ["0 B", "1023 B", "1.00 KiB", "1.50 KiB"]);
        assert_eq!(bytes(u64::MAX), "16777216.00 TiB");
        assert_eq!(above(1, 1025), "-1.00 KiB");
        assert_eq!([999, 1_500, 2_000_000, 3_000_000_000].map(time), ["999 ns", "1.50 µs", "2.00 ms", "3.00 s"]);
    }

    #[test]
    fn columns_align() {
        let mut table = Table::new(["a", "bytes"]);
        table.row(["longer".to_owned(), "1".to_owned()]);
        assert_eq!(table.text(), "  a       bytes\n  longer      1\n");
        table.row(["a|b".to_owned(), "2".to_owned()]);
        assert_eq!(table.markdown(), "| a | bytes |\n|---|---:|\n| longer | 1 |\n| a\\|b | 2 |\n");
    }
}
