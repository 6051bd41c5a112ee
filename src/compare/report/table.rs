use std::fmt;

/// Text in rows and columns, under a caption.
#[derive(Debug)]
pub(crate) struct Table {
    pub(crate) caption: String,
    pub(crate) head: Vec<String>,
    pub(crate) rows: Vec<Vec<String>>,
}

/// As Markdown whose columns stand in line, so that it reads well on a terminal too.
impl fmt::Display for Table {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        let escaped = |cells: &Vec<String>| -> Vec<String> {
            cells.iter().map(|cell| cell.replace('|', "\\|")).collect()
        };
        let lines: Vec<Vec<String>> = [&self.head]
            .into_iter()
            .chain(&self.rows)
            .map(escaped)
            .collect();
        let width = |column: usize| {
            let cells = lines.iter().map(|line| line[column].chars().count());
            cells.max().unwrap_or(0).max(3)
        };
        let widths: Vec<usize> = (0..self.head.len()).map(width).collect();

        writeln!(formatter, "{}:\n", self.caption)?;
        for (index, line) in lines.iter().enumerate() {
            if index > 0 {
                writeln!(formatter)?;
            }
            write_line(formatter, line, &widths)?;
            if index == 0 {
                let rules: Vec<String> = widths.iter().map(|&width| "-".repeat(width)).collect();
                writeln!(formatter)?;
                write_line(formatter, &rules, &widths)?;
            }
        }
        Ok(())
    }
}

fn write_line(
    formatter: &mut fmt::Formatter<'_>,
    cells: &[String],
    widths: &[usize],
) -> fmt::Result {
    formatter.write_str("|")?;
    for (cell, &width) in cells.iter().zip(widths) {
        write!(formatter, " {cell:width$} |")?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_stand_in_line() {
        let row = |cells: [&str; 2]| cells.map(String::from).to_vec();
        let table = Table {
            caption: "Seconds".to_owned(),
            head: row(["stage", "a|b"]),
            rows: vec![row(["prompts", "1"]), row(["é", "12.5 s"])],
        };
        let expected = "\
Seconds:

| stage   | a\\|b   |
| ------- | ------ |
| prompts | 1      |
| é       | 12.5 s |";
        assert_eq!(table.to_string(), expected);
    }
}
