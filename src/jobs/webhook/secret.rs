//! Secrets that sign webhooks, as in the Standard Webhooks specification.

use std::fmt;
use std::str::FromStr;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ring::hmac;

/// What a secret begins with.
const PREFIX: &str = "whsec_";
/// Fewest and most bytes of a secret, as the specification has them.
const LENGTHS: std::ops::RangeInclusive<usize> = 24..=64;

/// A secret that sender and receiver share. Its `Debug` output does not contain it.
#[derive(Clone)]
pub struct WebhookSecret(hmac::Key);

/// Why a secret cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "give {PREFIX} and 24 to 64 random bytes in Base64; \
     echo {PREFIX}$(openssl rand -base64 32) makes one"
)]
pub struct InvalidWebhookSecret;

impl FromStr for WebhookSecret {
    type Err = InvalidWebhookSecret;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let digits = text.trim().strip_prefix(PREFIX);
        let digits = digits.ok_or(InvalidWebhookSecret)?;
        let bytes = STANDARD.decode(digits).map_err(|_| InvalidWebhookSecret)?;
        if !LENGTHS.contains(&bytes.len()) {
            return Err(InvalidWebhookSecret);
        }
        Ok(Self(hmac::Key::new(hmac::HMAC_SHA256, &bytes)))
    }
}

impl WebhookSecret {
    /// One signature of the header `webhook-signature`.
    fn sign(&self, id: &str, timestamp: u64, body: &[u8]) -> String {
        let mut context = hmac::Context::with_key(&self.0);
        context.update(format!("{id}.{timestamp}.").as_bytes());
        context.update(body);
        format!("v1,{}", STANDARD.encode(context.sign()))
    }
}

/// The header `webhook-signature`: one signature of each secret, separated by spaces.
pub(super) fn signatures(
    secrets: &[WebhookSecret],
    id: &str,
    timestamp: u64,
    body: &[u8],
) -> String {
    let signatures = secrets.iter().map(|it| it.sign(id, timestamp, body));
    signatures.collect::<Vec<_>>().join(" ")
}

impl fmt::Debug for WebhookSecret {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.write_str("***")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The example of the specification's reference libraries.
    const SECRET: &str = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
    const ID: &str = "msg_p5jXN8AQM9LWM0D4loKWxJek";
    const BODY: &[u8] = br#"{"test": 2432232314}"#;
    const SIGNATURE: &str = "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=";

    #[test]
    fn the_example_of_the_specification_has_its_signature() {
        let secret = SECRET.parse().unwrap();
        assert_eq!(signatures(&[secret], ID, 1_614_265_330, BODY), SIGNATURE);
    }

    #[test]
    fn each_secret_signs() {
        let other = format!("whsec_{}", STANDARD.encode([7; 32]));
        let secrets = [other.parse().unwrap(), SECRET.parse().unwrap()];
        let header = signatures(&secrets, ID, 1_614_265_330, BODY);
        let (first, second) = header.split_once(' ').unwrap();
        assert!(first.starts_with("v1,") && first != SIGNATURE);
        assert_eq!(second, SIGNATURE);
    }

    #[test]
    fn short_long_and_foreign_secrets_are_refused() {
        let secret = |bytes: usize| format!("whsec_{}", STANDARD.encode(vec![1; bytes]));
        for bytes in [24, 64] {
            assert!(secret(bytes).parse::<WebhookSecret>().is_ok());
        }
        let foreign = ["", "whsec_", "whsk_AAAA", "hunter2", "whsec_not base64"];
        let foreign = foreign.map(str::to_owned).into_iter();
        for text in foreign.chain([secret(23), secret(65)]) {
            let error = text.parse::<WebhookSecret>().unwrap_err().to_string();
            assert!(error.contains("24 to 64"));
            assert!(text.is_empty() || !error.contains(&text) || text == "whsec_");
        }
    }

    #[test]
    fn a_secret_is_not_shown() {
        let secret: WebhookSecret = SECRET.parse().unwrap();
        assert_eq!(format!("{secret:?}"), "***");
    }
}
