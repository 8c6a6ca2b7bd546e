//! What a machine holds of its host's memory.

use crate::guest::guest_with;

/// What a booted guest with one vCPU may cost beyond its own memory, in KiB.
const PROMISED: u64 = 24 << 10;

/// The memory that a run of `true` held at its end, in KiB.
fn held(cpus: &str) -> serde_json::Value {
    let ended = guest_with(&["--stats=json", "--cpus", cpus], &["true"], b"").expect(0);
    let line = ended.stderr.lines().rfind(|line| line.starts_with('{'));
    let line = line.unwrap_or_else(|| panic!("no statistics in: {}", ended.stderr));
    let stats: serde_json::Value = serde_json::from_str(line).unwrap();
    stats["memory_kib"].clone()
}

#[test]
fn a_booted_guest_holds_24_mib_beyond_its_own_memory_at_most() {
    let memory = held("1");
    let total = memory["total"].as_u64().unwrap();
    assert!((1..=PROMISED).contains(&total), "{memory:#}");
}

#[test]
fn every_kind_of_memory_is_found_and_they_add_up() {
    let memory = held("2");
    let of = |kind: &str| memory[kind].as_u64().unwrap();
    let kinds = [
        "code_cache",
        "block_tables",
        "address_spaces",
        "other",
        "program",
    ];
    assert!(kinds.iter().all(|kind| of(kind) > 0), "{memory:#}");
    let sum: u64 = kinds.iter().map(|kind| of(kind)).sum();
    assert_eq!(sum, of("total"), "{memory:#}");
    assert!(of("guest") > 10 << 10, "{memory:#}");
}
