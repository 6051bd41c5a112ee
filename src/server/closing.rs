//! The end of the server, for responses that wait for something else.

use std::sync::Arc;

use tokio::sync::watch;

/// Tells whether the server is about to end. Clones share it.
#[derive(Debug, Clone, Default)]
pub(super) struct Closing(Arc<watch::Sender<bool>>);

impl Closing {
    /// Ends all waiting responses, and those that come later.
    pub(super) fn close(&self) {
        self.0.send_replace(true);
    }

    /// Waits for [`Closing::close`].
    pub(super) async fn closed(&self) {
        // The sender lives as long as `self`.
        drop(self.0.subscribe().wait_for(|is_closing| *is_closing).await);
    }
}
