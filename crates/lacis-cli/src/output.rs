//! Printing that does not fail when nobody reads any more.

use std::io::Write as _;

use serde::Serialize;

/// Prints a line.
pub(crate) fn line(text: impl std::fmt::Display) {
    // A closed pipe is no error of ours: `lacis status | head` has all it wanted.
    let _ = writeln!(std::io::stdout(), "{text}");
}

/// Prints JSON, indented.
pub(crate) fn json(value: &impl Serialize) -> Result<(), serde_json::Error> {
    line(serde_json::to_string_pretty(value)?);
    Ok(())
}

/// Prints rows with their columns under one another, two spaces apart.
pub(crate) fn columns(rows: &[Vec<String>]) {
    for row in aligned(rows) {
        line(row);
    }
}

pub(crate) fn aligned(rows: &[Vec<String>]) -> Vec<String> {
    let count = rows.iter().map(Vec::len).max().unwrap_or(0);
    let width = |at: usize| rows.iter().filter_map(|row| row.get(at)).map(|cell| cell.chars().count()).max();
    let widths: Vec<usize> = (0..count).map(|at| width(at).unwrap_or(0)).collect();
    let text = |row: &Vec<String>| {
        let cells: Vec<String> =
            row.iter().zip(&widths).map(|(cell, width)| format!("{cell:width$}")).collect();
        cells.join("  ").trim_end().to_owned()
    };
    rows.iter().map(text).collect()
}

/// A table with titles.
pub(crate) fn table(titles: &[&str], rows: Vec<Vec<String>>) {
    let titles = titles.iter().map(ToString::to_string).collect();
    columns(&[vec![titles], rows].concat());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_widest_cell() {
        let row = |cells: &[&str]| cells.iter().map(ToString::to_string).collect::<Vec<_>>();
        let rows = [row(&["100.64.0.1", "a", "-"]), row(&["100.64.0.10", "bobby", "idle"])];
        assert_eq!(aligned(&rows), ["100.64.0.1   a      -", "100.64.0.10  bobby  idle"]);
    }
}
