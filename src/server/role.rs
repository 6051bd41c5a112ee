//! What a server does of the work of jobs.

/// What a server does: all, or one half of it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Role {
    /// It answers requests and generates images, for requests and for jobs.
    #[default]
    All,
    /// It stores jobs and answers questions about them. It has no weights and generates nothing.
    Api,
    /// It generates the images of jobs. Its only routes are those of monitoring.
    Worker,
}
