//! What the kernel does to names and keys.

use std::collections::HashSet;

use tapnat_common::abi::maps;

#[test]
fn the_kernel_does_not_cut_the_names_of_maps() {
    // BPF_OBJ_NAME_LEN is 16, with the 0 at the end.
    let whole: HashSet<_> = maps::all().filter(|name| name.len() < 16).collect();
    let all: Vec<_> = maps::all().collect();
    assert_eq!(whole.len(), all.len(), "{all:?}");
}
