//! Files by the libraries.
