//! Adapter files: names, numbers and refusals.
