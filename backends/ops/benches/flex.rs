//! The fused ops on flex beside their default bodies: `cargo bench -p kiln-ops --features flex`.

mod cases;

use burn_flex::{Flex, FlexDevice};

fn main() {
    cases::run::<Flex>(&FlexDevice);
}
