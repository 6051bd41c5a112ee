//! The tables of a report.

use crate::measure::{Cost, Table, median};

use super::super::{Comparison, IMAGE_U8, ImageDifference, StageDifference};
use super::CompareReport;

/// A selection of the stages, with one column for each comparison.
pub(super) fn agreement(report: &CompareReport) -> Table {
    let mut table = Table {
        caption: format!(
            "Largest difference from {}, relative to the stage's largest magnitude",
            report.reference
        ),
        head: vec!["stage".to_owned()],
        rows: Vec::new(),
    };
    let names = report.comparisons.iter().map(|c| c.name.clone());
    table.head.extend(names);
    let mut row = |label: &str, cell: &dyn Fn(&Comparison) -> Option<String>| {
        let cells = report.comparisons.iter().map(cell);
        let cells = cells.map(Option::unwrap_or_default);
        table
            .rows
            .push([label.to_owned()].into_iter().chain(cells).collect());
    };

    // All runs are of the same request and therefore have the same stages.
    let stages = report.comparisons.first().map(|first| &first.stages[..]);
    let stages = stages.unwrap_or_default();
    let last_step = stages.iter().filter_map(StageDifference::step).max();
    for stage in stages.iter().filter(|stage| stage.name != IMAGE_U8) {
        let step = stage.step();
        if step.is_none() || step == Some(1) || step == last_step {
            row(&stage.label(), &|comparison| {
                Some(largest(comparison.stage(&stage.name)?))
            });
        }
        if step.is_some() && step == last_step {
            row("latents, worst step", &|comparison| {
                let worst = comparison.worst_step()?;
                Some(format!("{} (step {})", largest(worst), worst.step()?))
            });
        }
    }
    let image = |comparison: &Comparison, cell: fn(&ImageDifference) -> String| {
        Some(cell(comparison.stage(IMAGE_U8)?.image.as_ref()?))
    };
    row("8-bit values equal", &|comparison| {
        image(comparison, |image| percent(image.equal_share))
    });
    row("8-bit image, PSNR", &|comparison| {
        image(comparison, |image| decibels(image.psnr_db))
    });
    row("8-bit image, SSIM", &|comparison| {
        image(comparison, |image| similarity(image.ssim))
    });
    row("first stage over the tolerance", &|comparison| {
        let stage = comparison.first_over();
        Some(stage.map_or_else(|| "none".to_owned(), StageDifference::label))
    });
    table
}

/// Time and memory with one column for each run; the memory table is left out if no backend counts
/// memory.
pub(super) fn costs(report: &CompareReport) -> Vec<Table> {
    let table = |caption: &str, cell: &dyn Fn(&[Cost]) -> Option<String>| {
        let phases: Vec<_> = report.runs.iter().map(|run| run.costs.phases()).collect();
        let mut table = Table {
            caption: caption.to_owned(),
            head: vec!["stage".to_owned()],
            rows: Vec::new(),
        };
        let names = report.runs.iter().map(|run| run.name.clone());
        table.head.extend(names);
        for (index, (label, _)) in phases.first().into_iter().flatten().enumerate() {
            let cells = phases.iter().map(|phases| cell(phases[index].1));
            let cells = cells.map(Option::unwrap_or_default);
            table
                .rows
                .push([(*label).to_owned()].into_iter().chain(cells).collect());
        }
        table
    };
    let time = table("Seconds (later steps: median)", &|costs| {
        let seconds = costs.iter().map(|cost| cost.seconds).collect();
        median(seconds).map(|seconds| format!("{seconds:.3}"))
    });
    let memory = table("Peak memory (in use after the stage), MiB", &|costs| {
        let largest = |bytes: fn(&Cost) -> Option<u64>| {
            let bytes = costs.iter().filter_map(bytes).max()?;
            Some(format!("{:.0}", bytes as f64 / f64::from(1 << 20)))
        };
        let most = largest(|cost| cost.memory_peak.or(cost.memory_reserved))?;
        let in_use = largest(|cost| cost.memory_in_use)?;
        Some(format!("{most} ({in_use})"))
    });
    let has_values = |table: &Table| {
        let mut cells = table.rows.iter().flat_map(|row| &row[1..]);
        cells.any(|cell| !cell.is_empty())
    };
    let tables = [time, memory].into_iter();
    tables.filter(has_values).collect()
}

/// All stages of one comparison.
pub(super) fn stages(report: &CompareReport, comparison: &Comparison) -> Table {
    let head = [
        "stage",
        "shape",
        "largest difference",
        "mean difference",
        "largest, relative",
        "mean, relative",
        "cosine",
        "PSNR",
        "SSIM",
        "equal",
        "within tolerance",
    ];
    let row = |stage: &StageDifference| {
        let difference = &stage.difference;
        let image = stage.image.as_ref();
        let image_cell =
            |cell: fn(&ImageDifference) -> String| image.map_or_else(String::new, cell);
        vec![
            stage.label(),
            stage
                .shape
                .iter()
                .map(ToString::to_string)
                .collect::<Vec<_>>()
                .join("×"),
            scientific(difference.max_abs),
            scientific(difference.mean_abs),
            largest(stage),
            scientific(difference.mean_relative),
            format!("{:.9}", difference.cosine),
            image_cell(|image| decibels(image.psnr_db)),
            image_cell(|image| similarity(image.ssim)),
            image_cell(|image| percent(image.equal_share)),
            if stage.within_tolerance { "yes" } else { "no" }.to_owned(),
        ]
    };
    Table {
        caption: format!("{} compared with {}", comparison.name, report.reference),
        head: head.map(String::from).to_vec(),
        rows: comparison.stages.iter().map(row).collect(),
    }
}

/// Formats the largest relative difference of a stage.
fn largest(stage: &StageDifference) -> String {
    let largest = scientific(stage.difference.max_relative);
    match stage.difference.non_finite {
        0 => largest,
        count => format!("{largest}, {count} not finite"),
    }
}

pub(super) fn scientific(value: f64) -> String {
    if value == 0.0 {
        "0".to_owned()
    } else {
        format!("{value:.1e}")
    }
}

/// Formats a share in percent, rounded down, so that only 1 gives 100 %.
pub(super) fn percent(share: f64) -> String {
    // The f64 nearest to 0.999 may be slightly less.
    let thousandths = (share * 1e5 + 1e-6).floor();
    format!("{} %", thousandths / 1e3)
}

fn decibels(psnr: Option<f64>) -> String {
    psnr.map_or_else(|| "equal".to_owned(), |psnr| format!("{psnr:.1} dB"))
}

fn similarity(ssim: Option<f64>) -> String {
    ssim.map_or_else(|| "too small".to_owned(), |ssim| format!("{ssim:.6}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_equality_is_100_percent() {
        assert_eq!(percent(1.0), "100 %");
        assert_eq!(percent(0.999_999), "99.999 %");
        assert_eq!(percent(0.999), "99.9 %");
        assert_eq!(percent(0.0), "0 %");
    }
}
