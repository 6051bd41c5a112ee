//! Tests with a NATS server on this machine.
