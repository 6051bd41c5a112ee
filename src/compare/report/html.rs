//! The report as one HTML file that loads nothing.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD as BASE64;
use kiln_models::job::RgbImage;
use maud::{DOCTYPE, Markup, PreEscaped, html};

use crate::image::{EncodeError, Encoding, ImageFormat, encode};

use super::super::heat_map::{HEAT_MAP_DECADES, heat_colour};
use super::table::Table;
use super::{Report, chart, tables};

const STYLE: &str = include_str!("style.css");

pub(super) fn page(report: &Report) -> Result<String, EncodeError> {
    let pictures = pictures(report)?;
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                meta http-equiv="Content-Security-Policy"
                    content="default-src 'none'; img-src data:; style-src 'unsafe-inline'";
                title { (report.title()) }
                style { (PreEscaped(STYLE)) }
            }
            body {
                main {
                    h1 { (report.title()) }
                    @for (verdict, comparison) in report.verdicts().iter().zip(&report.comparisons) {
                        p class=(if comparison.within_tolerance() { "within" } else { "over" }) {
                            (verdict)
                        }
                    }
                    h2 { "What was drawn" }
                    dl {
                        @for (name, value) in report.facts() {
                            dt { (name) }
                            dd { (value) }
                        }
                    }
                    h2 { "Pictures" }
                    (pictures)
                    h2 { "Agreement" }
                    (table(&tables::agreement(report)))
                    h2 { "Largest relative difference of the latents after every step" }
                    (chart::errors_per_step(report))
                    h2 { "Time and memory" }
                    @for costs in tables::costs(report) { (table(&costs)) }
                    h2 { "Every stage" }
                    @for comparison in &report.comparisons {
                        (table(&tables::stages(report, comparison)))
                    }
                }
            }
        }
    };
    Ok(page.into_string())
}

/// The reference's picture, then each run's with its heat map.
fn pictures(report: &Report) -> Result<Markup, EncodeError> {
    let (prompt, reference) = (&report.settings.prompt, &report.reference);
    let figure = |picture: &RgbImage, caption: &str, text: &str| -> Result<Markup, EncodeError> {
        let url = data_url(picture)?;
        Ok(html! {
            figure {
                img src=(url) width=(picture.width) height=(picture.height) alt=(text);
                figcaption { (caption) }
            }
        })
    };
    let drawn = |picture: &RgbImage, name: &str| {
        let text = format!("What {name} drew of: {prompt}");
        figure(picture, name, &text)
    };
    let mut figures = vec![drawn(&report.reference_picture, reference)?];
    for comparison in &report.comparisons {
        let name = &comparison.name;
        figures.push(drawn(&comparison.picture, name)?);
        let caption = format!("{name}, difference from {reference}");
        let text = format!("Heat map of the differences between {name} and {reference}");
        figures.push(figure(&comparison.heat_map, &caption, &text)?);
    }
    let legend = (-HEAT_MAP_DECADES..=0).map(|decade| {
        let [red, green, blue] = heat_colour(10_f64.powi(decade));
        let label = if decade == -HEAT_MAP_DECADES {
            format!("1e{decade} and less")
        } else {
            format!("1e{decade}")
        };
        (format!("background: rgb({red} {green} {blue})"), label)
    });
    Ok(html! {
        div class="pictures" { @for figure in figures { (figure) } }
        p { "Heat maps show, for every pixel, the largest difference of its three channels before \
             rounding; 1 is the difference between black and white." }
        ul class="legend" {
            @for (style, label) in legend {
                li { span class="swatch" style=(style) {} " " (label) }
            }
        }
    })
}

fn data_url(picture: &RgbImage) -> Result<String, EncodeError> {
    let mut url = "data:image/png;base64,".to_owned();
    let file = encode(picture, Encoding::new(ImageFormat::Png), None)?;
    BASE64.encode_string(file, &mut url);
    Ok(url)
}

fn table(table: &Table) -> Markup {
    html! {
        // Wide tables scroll by themselves, with the keyboard too.
        div class="scroll" role="region" tabindex="0" aria-label=(table.caption) {
            table {
                caption { (table.caption) }
                thead {
                    tr { @for cell in &table.head { th scope="col" { (cell) } } }
                }
                tbody {
                    @for row in &table.rows {
                        tr {
                            @for (index, cell) in row.iter().enumerate() {
                                @if index == 0 { th scope="row" { (cell) } }
                                @else { td { (cell) } }
                            }
                        }
                    }
                }
            }
        }
    }
}
