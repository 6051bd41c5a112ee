//! A chart of the difference after every step, as SVG.

use maud::{Markup, html};

use super::super::Comparison;
use super::CompareReport;
use super::tables::scientific;

const WIDTH: f64 = 720.0;
const HEIGHT: f64 = 320.0;
/// Borders of the plotted area.
const LEFT: f64 = 64.0;
const RIGHT: f64 = WIDTH - 16.0;
/// Leaves room for a label above the topmost line.
const TOP: f64 = 24.0;
const BOTTOM: f64 = HEIGHT - 44.0;
/// Dash patterns, so that lines differ in more than colour.
const DASHES: [&str; 4] = ["none", "8 4", "2 3", "10 3 2 3"];
/// Number of classes `series-0`, `series-1`, ... in the style sheet.
const COLOURS: usize = 4;
/// Approximate number of labels on the axis of steps.
const STEP_LABELS: usize = 10;
/// Largest number of horizontal grid lines.
const DECADE_LINES: i32 = 10;

/// The range of a logarithmic axis, in powers of ten.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Decades {
    low: i32,
    high: i32,
}

impl Decades {
    /// The smallest range of whole decades that contains all positive finite values; at least one
    /// decade.
    fn around(values: impl Iterator<Item = f64>) -> Self {
        let logarithms = values.filter(|v| *v > 0.0 && v.is_finite()).map(f64::log10);
        let (low, high) = logarithms.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), v| {
            (low.min(v), high.max(v))
        });
        if low > high {
            return Self { low: -8, high: 0 };
        }
        let low = low.floor() as i32;
        Self {
            low,
            high: (high.ceil() as i32).max(low + 1),
        }
    }

    /// The y coordinate of a value. Zero and values outside the range lie on the border.
    fn y(self, value: f64) -> f64 {
        let (low, high) = (f64::from(self.low), f64::from(self.high));
        let share = (value.log10() - low) / (high - low);
        BOTTOM - share.clamp(0.0, 1.0) * (BOTTOM - TOP)
    }
}

/// Plots the largest relative difference after every step, one line for each comparison, and the
/// tolerance.
pub(super) fn errors_per_step(report: &CompareReport) -> Markup {
    let comparisons = &report.comparisons;
    let tolerance = report.tolerance.max_relative;
    let values = comparisons.iter().flat_map(errors).map(|(_, error)| error);
    let decades = Decades::around(values.chain([tolerance]));
    let steps = report.settings.sampling.steps;
    let x = |step: usize| {
        let share = (step - 1) as f64 / (steps - 1).max(1) as f64;
        LEFT + share * (RIGHT - LEFT)
    };
    let every = steps.div_ceil(STEP_LABELS);
    let decades_apart = (decades.high - decades.low).div_euclid(DECADE_LINES) + 1;
    html! {
        svg class="chart" viewBox={ "0 0 " (WIDTH) " " (HEIGHT) } role="img"
            aria-labelledby="chart-title chart-text" {
            title id="chart-title" { "Largest relative difference after every step" }
            desc id="chart-text" { (description(report)) }
            @for decade in (decades.low..=decades.high).step_by(decades_apart as usize) {
                @let y = pixels(decades.y(10_f64.powi(decade)));
                line class="grid" x1=(LEFT) x2=(RIGHT) y1=(y) y2=(y) {}
                text x=(LEFT - 8.0) y=(y) text-anchor="end" dominant-baseline="middle" {
                    "1e" (decade)
                }
            }
            @for step in (1..=steps).step_by(every) {
                text x=(pixels(x(step))) y=(BOTTOM + 18.0) text-anchor="middle" { (step) }
            }
            text x=(f64::midpoint(LEFT, RIGHT)) y=(HEIGHT - 6.0) text-anchor="middle" { "step" }
            @if tolerance > 0.0 {
                @let y = pixels(decades.y(tolerance));
                line class="tolerance" x1=(LEFT) x2=(RIGHT) y1=(y) y2=(y) {}
                text class="tolerance-text" x=(RIGHT) y=(pixels(decades.y(tolerance) - 6.0))
                    text-anchor="end" { "tolerance" }
            }
            @for (index, comparison) in comparisons.iter().enumerate() {
                @let points: Vec<(f64, f64)> =
                    errors(comparison).map(|(step, error)| (x(step), decades.y(error))).collect();
                polyline class={ "line series-" (index % COLOURS) }
                    stroke-dasharray=(dashes(index))
                    points=(points_attribute(&points)) {}
                @for (x, y) in points {
                    circle class={ "dot series-" (index % COLOURS) }
                        cx=(pixels(x)) cy=(pixels(y)) r="2.5" {}
                }
            }
        }
        ul class="legend" {
            @for (index, comparison) in comparisons.iter().enumerate() {
                li {
                    svg viewBox="0 0 40 10" width="40" height="10" aria-hidden="true" {
                        line class={ "line series-" (index % COLOURS) } x1="0" x2="40" y1="5"
                            y2="5" stroke-dasharray=(dashes(index)) {}
                    }
                    " " (comparison.name)
                }
            }
        }
    }
}

/// The dash pattern of a line. Lines of the same colour have different patterns.
fn dashes(index: usize) -> &'static str {
    DASHES[(index + index / COLOURS) % DASHES.len()]
}

/// The number of every step and the largest relative difference after it.
fn errors(comparison: &Comparison) -> impl Iterator<Item = (usize, f64)> {
    let stages = comparison.stages.iter();
    stages.filter_map(|stage| Some((stage.step()?, stage.difference.max_relative)))
}

/// Text alternative of the chart for screen readers.
fn description(report: &CompareReport) -> String {
    let ends = |comparison: &Comparison| {
        let (mut errors, name) = (errors(comparison), &comparison.name);
        let first = errors.next()?.1;
        let last = errors.last().map_or(first, |(_, error)| error);
        Some(format!(
            "{name}: {} after the first step, {} after the last.",
            scientific(first),
            scientific(last)
        ))
    };
    let lines: Vec<String> = report.comparisons.iter().filter_map(ends).collect();
    format!(
        "{} The tolerance is {:e}. The tables below have every number.",
        lines.join(" "),
        report.tolerance.max_relative
    )
}

fn points_attribute(points: &[(f64, f64)]) -> String {
    let pairs = points.iter();
    let pairs: Vec<String> = pairs
        .map(|&(x, y)| format!("{},{}", pixels(x), pixels(y)))
        .collect();
    pairs.join(" ")
}

/// Formats a coordinate with one decimal.
fn pixels(value: f64) -> String {
    format!("{value:.1}")
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use super::*;

    #[test]
    fn the_axis_spans_whole_decades_around_the_values() {
        let around = |values: &[f64]| Decades::around(values.iter().copied());
        let decades = |low, high| Decades { low, high };
        assert_eq!(around(&[3e-7, 0.0, 2e-3]), decades(-7, -2));
        assert_eq!(around(&[1e-3, f64::INFINITY, f64::NAN]), decades(-3, -2));
        assert_eq!(around(&[0.0]), decades(-8, 0));
    }

    #[test]
    fn sixteen_lines_have_different_styles() {
        let styles: HashSet<_> = (0..16)
            .map(|index| (index % COLOURS, dashes(index)))
            .collect();
        assert_eq!(styles.len(), 16);
    }

    #[test]
    fn the_y_coordinate_is_logarithmic() {
        let decades = Decades { low: -6, high: -2 };
        assert_eq!(decades.y(1e-6), BOTTOM);
        assert_eq!(decades.y(1e-2), TOP);
        assert!((decades.y(1e-4) - f64::midpoint(TOP, BOTTOM)).abs() < 1e-9);
        assert_eq!(decades.y(0.0), BOTTOM);
        assert_eq!(decades.y(1.0), TOP);
    }
}
