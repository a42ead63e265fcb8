//! Aligned text columns for a terminal, without lines or colours.

/// Between two columns.
const GAP: &str = "  ";

/// A table whose first row is its head. Cells that look like numbers are aligned right, and so are the heads above them.
#[derive(Default)]
pub struct TextTable {
    rows: Vec<Vec<String>>,
}

impl TextTable {
    pub fn new<const N: usize>(head: [&str; N]) -> Self {
        Self { rows: vec![head.map(str::to_owned).to_vec()] }
    }

    /// # Panics
    /// When the row has not as many cells as the head.
    pub fn push<const N: usize>(&mut self, row: [String; N]) {
        assert_eq!(row.len(), self.rows[0].len(), "a row has as many cells as the head");
        self.rows.push(row.to_vec());
    }

    /// Renders the table without columns whose cells are all empty. Lines have no trailing spaces.
    pub fn render(&self) -> String {
        let columns: Vec<Column> = (0..self.rows[0].len()).filter_map(|index| Column::of(index, &self.rows)).collect();
        let mut text = String::new();
        for row in &self.rows {
            let cells: Vec<String> = columns.iter().map(|column| column.pad(&row[column.index])).collect();
            text += cells.join(GAP).trim_end();
            text.push('\n');
        }
        text
    }
}

struct Column {
    index: usize,
    width: usize,
    is_numeric: bool,
}

impl Column {
    /// None for a column without content.
    fn of(index: usize, rows: &[Vec<String>]) -> Option<Self> {
        let cells = || rows.iter().map(|row| row[index].as_str());
        let mut content = cells().skip(1).filter(|cell| !cell.is_empty()).peekable();
        content.peek()?;
        let is_numeric = content.all(|cell| cell == "–" || cell.starts_with(|c: char| c.is_ascii_digit()));
        let width = cells().map(|cell| cell.chars().count()).max().unwrap_or(0);
        Some(Self { index, width, is_numeric })
    }

    fn pad(&self, cell: &str) -> String {
        let space = " ".repeat(self.width - cell.chars().count());
        if self.is_numeric { space + cell } else { cell.to_owned() + &space }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_stand_right_words_left_and_empty_columns_are_left_out() {
        let mut table = TextTable::new(["NAME", "ZONE", "COUNT", "NOTE"]);
        table.push(["a".into(), String::new(), "12".into(), String::new()]);
        table.push(["long name".into(), String::new(), "–".into(), "x".into()]);
        assert_eq!(table.render(), "NAME       COUNT  NOTE\na             12\nlong name      –  x\n");
    }
}
