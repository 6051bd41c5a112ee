//! Times the fused ops and their default bodies on flex: `cargo bench -p kiln-ops --features flex`.

mod cases;

use burn_flex::{Flex, FlexDevice};

fn main() {
    cases::run::<Flex>(&FlexDevice);
}
