//! A VM's definition, as a peer sends it.
#![no_main]

use libfuzzer_sys::fuzz_target;
use transhume_machine::Definition;

fuzz_target!(|data: &[u8]| {
    let Ok(text) = std::str::from_utf8(data) else {
        return;
    };
    if let Ok(definition) = Definition::parse(text) {
        let written = definition.to_toml().expect("it was read");
        assert_eq!(Definition::parse(&written).expect("it was written"), definition);
    }
});
