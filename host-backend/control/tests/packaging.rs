//! The examples that are installed are understood by the programs that they are for.

use transhume_machine::Definition;

#[test]
fn the_example_of_a_vm_is_valid() {
    let definition = Definition::parse(include_str!("../../../packaging/host/web1.toml")).unwrap();
    assert_eq!(definition.name, "web1");
    assert_eq!(definition.disks.len(), 2);
    let data = &definition.disks[1];
    assert_ne!(
        definition.disk_path(data, "hosta"),
        definition.disk_path(data, "hostb")
    );
}
