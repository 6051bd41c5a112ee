//! When a webhook that failed is tried again.

use std::time::{Duration, SystemTime};

use crate::request::random_u64;

/// Waits after failed tries. With the first try, which waits for nothing, there are ten tries within
/// almost eight hours.
pub(super) const WAITS: [Duration; 9] = [
    Duration::from_secs(5),
    Duration::from_secs(20),
    Duration::from_mins(1),
    Duration::from_mins(5),
    Duration::from_mins(15),
    Duration::from_mins(30),
    Duration::from_hours(1),
    Duration::from_hours(2),
    Duration::from_hours(4),
];

/// Longest wait that a receiver can ask for.
pub(super) const MAX_RETRY_AFTER: Duration = Duration::from_hours(4);

/// The wait after a failed try with `tries` tries before it, up to a tenth longer than in the table, so
/// that many webhooks that failed together are not sent together. `None` after the last try.
pub(super) fn wait(tries: u32, retry_after: Option<Duration>) -> Option<Duration> {
    let wait = *WAITS.get(usize::try_from(tries).ok()?)?;
    let part = random_u64() as f64 / u64::MAX as f64;
    let wait = wait.mul_f64(1.0 + 0.1 * part);
    let asked = retry_after.unwrap_or_default().min(MAX_RETRY_AFTER);
    Some(wait.max(asked))
}

/// The time in a `Retry-After` header, which has seconds or a date.
pub(super) fn retry_after(text: &str) -> Option<Duration> {
    let text = text.trim();
    if let Ok(seconds) = text.parse() {
        return Some(Duration::from_secs(seconds));
    }
    let date = httpdate::parse_http_date(text).ok()?;
    Some(date.duration_since(SystemTime::now()).unwrap_or_default())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ten_tries_take_almost_eight_hours() {
        let waits: Vec<Duration> = (0..).map_while(|tries| wait(tries, None)).collect();
        assert_eq!(waits.len(), 9);
        for (wait, table) in waits.iter().zip(WAITS) {
            assert!((table..=table.mul_f64(1.1)).contains(wait), "{wait:?}");
        }
        assert_eq!(WAITS.iter().sum::<Duration>(), Duration::from_secs(28_285));
        assert_eq!(wait(u32::MAX, None), None);
    }

    #[test]
    fn the_receiver_can_ask_for_a_longer_wait() {
        let minute = Some(Duration::from_mins(1));
        assert_eq!(wait(0, minute), minute);
        assert!(wait(5, minute).unwrap() >= WAITS[5]);
        assert_eq!(wait(9, minute), None);
        assert_eq!(wait(0, Some(Duration::MAX)), Some(MAX_RETRY_AFTER));
        assert_eq!(retry_after(" 7 "), Some(Duration::from_secs(7)));
        let past = retry_after("Sun, 06 Nov 1994 08:49:37 GMT");
        assert_eq!(past, Some(Duration::ZERO));
        for text in ["soon", "-1", ""] {
            assert_eq!(retry_after(text), None);
        }
    }
}
