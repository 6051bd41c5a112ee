//! Host names to addresses, without private ones: a name on the allow-list may stand for any address,
//! and for another one at each look-up.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use reqwest::dns::{Addrs, Name, Resolve, Resolving};

use super::address;

/// Leaves private addresses out of what another resolver finds.
pub(super) struct PublicResolver {
    inner: Arc<dyn Resolve>,
}

impl PublicResolver {
    pub(super) fn new(inner: Arc<dyn Resolve>) -> Self {
        Self { inner }
    }
}

/// A host has no address that webhooks may be sent to.
#[derive(Debug, thiserror::Error)]
#[error("{host} has private or reserved addresses only; --webhook-allow-private allows them")]
struct OnlyPrivate {
    host: String,
}

impl Resolve for PublicResolver {
    fn resolve(&self, name: Name) -> Resolving {
        let host = name.as_str().to_owned();
        let found = self.inner.resolve(name);
        Box::pin(async move {
            let is_public = |address: &SocketAddr| address::is_public(address.ip());
            let public: Vec<SocketAddr> = found.await?.filter(is_public).collect();
            if public.is_empty() {
                return Err(OnlyPrivate { host }.into());
            }
            Ok(Box::new(public.into_iter()) as Addrs)
        })
    }
}

/// The operating system's resolver.
pub(super) struct SystemResolver;

impl Resolve for SystemResolver {
    fn resolve(&self, name: Name) -> Resolving {
        Box::pin(async move {
            // The port is that of the URL.
            let found = tokio::net::lookup_host((name.as_str(), 0)).await?;
            let found: Vec<SocketAddr> = found.collect();
            if found.is_empty() {
                return Err(io::Error::from(io::ErrorKind::NotFound).into());
            }
            Ok(Box::new(found.into_iter()) as Addrs)
        })
    }
}
