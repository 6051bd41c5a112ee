//! The variables of the environment that OpenTelemetry defines, as far as kiln reads them itself. The
//! libraries read the others: see `docs/serving.md`.

#[cfg(feature = "otel")]
use super::TelemetryError;

/// Where the traces of all programs go: `/v1/traces` below this URL.
pub(super) const ENDPOINT: &str = "OTEL_EXPORTER_OTLP_ENDPOINT";

/// Where traces go: this URL.
pub(super) const TRACES_ENDPOINT: &str = "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT";

/// Which variable says where traces go, and its value. `None` if tracing is off.
pub(super) fn endpoint(get: impl Fn(&str) -> Option<String>) -> Option<(&'static str, String)> {
    // An empty variable counts as unset.
    let value = |name: &str| {
        let value = get(name)?.trim().to_owned();
        (!value.is_empty()).then_some(value)
    };
    let is =
        |name: &str, text: &str| value(name).is_some_and(|value| value.eq_ignore_ascii_case(text));
    if is("OTEL_SDK_DISABLED", "true") || is("OTEL_TRACES_EXPORTER", "none") {
        return None;
    }
    let of = |name: &'static str| Some((name, value(name)?));
    of(TRACES_ENDPOINT).or_else(|| of(ENDPOINT))
}

/// What of the environment is not done as it says.
#[cfg(feature = "otel")]
pub(super) fn warnings(get: impl Fn(&str) -> Option<String>) -> Vec<String> {
    let value = |name: &str| get(name).filter(|value| !value.trim().is_empty());
    let mut warnings = Vec::new();
    let of_traces = |signal: &'static str, common: &'static str| {
        let names = [signal, common];
        names
            .into_iter()
            .find_map(|name| Some((name, value(name)?)))
    };
    let protocol = of_traces(
        "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL",
        "OTEL_EXPORTER_OTLP_PROTOCOL",
    );
    if let Some((name, value)) = protocol.filter(|(_, value)| value != "http/protobuf") {
        warnings.push(format!(
            "{name} is {value:?}, and kiln sends traces as http/protobuf only: give the URL of a \
             collector's OTLP/HTTP port, which is 4318 by default"
        ));
    }
    let exporter = value("OTEL_TRACES_EXPORTER");
    if let Some(value) = exporter.filter(|value| value != "otlp") {
        warnings.push(format!(
            "OTEL_TRACES_EXPORTER is {value:?}, and kiln has otlp and none: traces are sent as otlp"
        ));
    }
    if let Some(sampler) = value("OTEL_TRACES_SAMPLER") {
        let argument = value("OTEL_TRACES_SAMPLER_ARG");
        match sampler.as_str() {
            "always_on" | "always_off" | "parentbased_always_on" | "parentbased_always_off" => {}
            "traceidratio" | "parentbased_traceidratio" => {
                let ratio = argument.as_deref().unwrap_or_default().parse();
                if !ratio.is_ok_and(|ratio: f64| (0.0..=1.0).contains(&ratio)) {
                    warnings.push(format!(
                        "OTEL_TRACES_SAMPLER_ARG is {:?}, which is no number from 0 to 1",
                        argument.unwrap_or_default()
                    ));
                }
            }
            _ => warnings.push(format!(
                "OTEL_TRACES_SAMPLER is {sampler:?}, which kiln does not have: \
                 parentbased_always_on is used"
            )),
        }
    }
    warnings
}

/// Refuses a compression that kiln does not have.
#[cfg(feature = "otel")]
pub(super) fn check_compression(
    get: impl Fn(&str) -> Option<String>,
) -> Result<(), TelemetryError> {
    let names = [
        "OTEL_EXPORTER_OTLP_TRACES_COMPRESSION",
        "OTEL_EXPORTER_OTLP_COMPRESSION",
    ];
    let given = names.into_iter().find_map(|name| Some((name, get(name)?)));
    match given {
        Some((variable, value)) if !["", "gzip", "none"].contains(&value.as_str()) => {
            Err(TelemetryError::Compression { variable, value })
        }
        _ => Ok(()),
    }
}
