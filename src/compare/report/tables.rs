//! The tables of a report.

use super::super::{Comparison, Cost, PICTURE, PictureDifference, StageDifference};
use super::Report;
use super::table::Table;

/// The stages that tell most, a column a comparison.
pub(super) fn agreement(report: &Report) -> Table {
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

    // All runs are of the same request, and have the same stages.
    let stages = report.comparisons.first().map(|first| &first.stages[..]);
    let stages = stages.unwrap_or_default();
    let last_step = stages.iter().filter_map(StageDifference::step).max();
    for stage in stages.iter().filter(|stage| stage.name != PICTURE) {
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
    let picture = |comparison: &Comparison, cell: fn(&PictureDifference) -> String| {
        Some(cell(comparison.stage(PICTURE)?.picture.as_ref()?))
    };
    row("8-bit values equal", &|comparison| {
        picture(comparison, |picture| percent(picture.equal_share))
    });
    row("8-bit picture, PSNR", &|comparison| {
        picture(comparison, |picture| decibels(picture.psnr_db))
    });
    row("8-bit picture, SSIM", &|comparison| {
        picture(comparison, |picture| similarity(picture.ssim))
    });
    row("first stage over the tolerance", &|comparison| {
        let stage = comparison.first_over();
        Some(stage.map_or_else(|| "none".to_owned(), StageDifference::label))
    });
    table
}

/// Time, and memory as far as anybody counts it, a column a run.
pub(super) fn costs(report: &Report) -> Vec<Table> {
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
    let time = table("Seconds (of the later steps the median)", &|costs| {
        let seconds = costs.iter().map(|cost| cost.seconds).collect();
        median(seconds).map(|seconds| format!("{seconds:.3}"))
    });
    let memory = table("Most memory held (in use after the stage), MiB", &|costs| {
        let largest = |bytes: fn(&Cost) -> Option<u64>| {
            let bytes = costs.iter().filter_map(bytes).max()?;
            Some(format!("{:.0}", bytes as f64 / f64::from(1 << 20)))
        };
        let most = largest(|cost| cost.memory_peak.or(cost.memory_reserved))?;
        let in_use = largest(|cost| cost.memory_in_use)?;
        Some(format!("{most} ({in_use})"))
    });
    let says_something = |table: &Table| {
        let mut cells = table.rows.iter().flat_map(|row| &row[1..]);
        cells.any(|cell| !cell.is_empty())
    };
    let tables = [time, memory].into_iter();
    tables.filter(says_something).collect()
}

/// All stages of one comparison.
pub(super) fn stages(report: &Report, comparison: &Comparison) -> Table {
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
        let picture = stage.picture.as_ref();
        let in_picture =
            |cell: fn(&PictureDifference) -> String| picture.map_or_else(String::new, cell);
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
            in_picture(|picture| decibels(picture.psnr_db)),
            in_picture(|picture| similarity(picture.ssim)),
            in_picture(|picture| percent(picture.equal_share)),
            if stage.within_tolerance { "yes" } else { "no" }.to_owned(),
        ]
    };
    Table {
        caption: format!("{} compared with {}", comparison.name, report.reference),
        head: head.map(String::from).to_vec(),
        rows: comparison.stages.iter().map(row).collect(),
    }
}

/// The largest relative difference of a stage.
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

/// A share in percent, rounded down: 100 % is all.
pub(super) fn percent(share: f64) -> String {
    // What stands for 0.999 may be a little less.
    let thousandths = (share * 1e5 + 1e-6).floor();
    format!("{} %", thousandths / 1e3)
}

fn decibels(psnr: Option<f64>) -> String {
    psnr.map_or_else(|| "equal".to_owned(), |psnr| format!("{psnr:.1} dB"))
}

fn similarity(ssim: Option<f64>) -> String {
    ssim.map_or_else(|| "too small".to_owned(), |ssim| format!("{ssim:.6}"))
}

fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    let (low, high) = (values.len().checked_sub(1)? / 2, values.len() / 2);
    Some(f64::midpoint(values[low], values[high]))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn not_quite_all_is_not_100_percent() {
        assert_eq!(percent(1.0), "100 %");
        assert_eq!(percent(0.999_999), "99.999 %");
        assert_eq!(percent(0.999), "99.9 %");
        assert_eq!(percent(0.0), "0 %");
    }

    #[test]
    fn the_median_is_in_the_middle() {
        assert_eq!(median(vec![]), None);
        assert_eq!(median(vec![3.0]), Some(3.0));
        assert_eq!(median(vec![9.0, 1.0, 2.0]), Some(2.0));
        assert_eq!(median(vec![9.0, 1.0, 2.0, 4.0]), Some(3.0));
    }
}
