//! The header `traceparent` of W3C Trace Context.

/// Whether a value of `traceparent` can be continued: <https://www.w3.org/TR/trace-context/>.
pub fn is_trace_parent(value: &str) -> bool {
    let mut parts = value.split('-');
    let mut field = |length: usize| {
        let is_digit = |byte: u8| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte);
        let part = parts.next()?;
        (part.len() == length && part.bytes().all(is_digit)).then_some(part)
    };
    let fields = (field(2), field(32), field(16), field(2));
    let (Some(version), Some(trace), Some(span), Some(_)) = fields else {
        return false;
    };
    let is_zero = |id: &str| id.bytes().all(|byte| byte == b'0');
    // Later versions may have further fields.
    let has_its_length = version != "00" || parts.next().is_none();
    version != "ff" && !is_zero(trace) && !is_zero(span) && has_its_length
}
