//! Measuring the calls of a pipeline, and the tables that present what was measured.

use std::fmt;
use std::fs;
use std::time::Instant;

use kiln_models::pipeline::{MemoryUse, Pipeline, PipelineError};
use serde::Serialize;

use crate::engine::{JobError, caught};

/// Time and memory of one stage. Memory is in bytes, `None` if the backend does not count it.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct Cost {
    pub seconds: f64,
    /// Memory held after the stage: of the process on CPU backends, of the device otherwise.
    pub memory_in_use: Option<u64>,
    /// `memory_in_use` plus what the allocator keeps for reuse.
    pub memory_reserved: Option<u64>,
    /// Peak memory: of the stage on CPU backends under Linux, since the start of the program
    /// otherwise.
    pub memory_peak: Option<u64>,
}

/// Measures one stage, from [`CostMeter::start`] to [`CostMeter::stop`].
#[derive(Debug)]
pub struct CostMeter {
    started: Instant,
}

impl CostMeter {
    pub fn start() -> Self {
        // On Linux this resets the process's peak memory to what it holds now.
        fs::write("/proc/self/clear_refs", "5").ok();
        Self {
            started: Instant::now(),
        }
    }

    /// `memory` is the memory use of the pipeline after the stage.
    pub fn stop(self, memory: MemoryUse) -> Cost {
        Cost {
            seconds: self.started.elapsed().as_secs_f64(),
            memory_in_use: memory.in_use,
            memory_reserved: memory.reserved,
            memory_peak: memory.peak,
        }
    }
}

/// Calls a pipeline and measures the call. A panic of the pipeline becomes an error.
pub(crate) fn measure_call<T>(
    pipeline: &mut dyn Pipeline,
    call: impl FnOnce(&mut dyn Pipeline) -> Result<T, PipelineError>,
) -> Result<(T, Cost), JobError> {
    let meter = CostMeter::start();
    let value = caught(|| call(pipeline))?;
    Ok((value, meter.stop(pipeline.memory())))
}

/// The median; the mean of the two middle values if their number is even. `None` without values.
pub(crate) fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let (low, high) = (values.len().checked_sub(1)? / 2, values.len() / 2);
    Some(f64::midpoint(values[low], values[high]))
}

/// Text in rows and columns, under a caption. Displays as Markdown with aligned columns.
#[derive(Debug)]
pub(crate) struct Table {
    pub(crate) caption: String,
    pub(crate) head: Vec<String>,
    pub(crate) rows: Vec<Vec<String>>,
}

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
    fn table_columns_are_aligned() {
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

    #[test]
    fn the_median_is_the_middle_value_or_the_mean_of_two() {
        assert_eq!(median(vec![]), None);
        assert_eq!(median(vec![3.0]), Some(3.0));
        assert_eq!(median(vec![9.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(vec![9.0, 1.0, 2.0, 4.0]), Some(3.0));
    }
}
