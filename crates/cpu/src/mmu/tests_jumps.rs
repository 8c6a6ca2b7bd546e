//! Jump caches: two addresses that share a line.

use super::*;

/// The first address after `pc` that has its line.
fn rival(pc: u64) -> u64 {
    (pc + 1..pc + (1 << 32))
        .find(|other| jump_index(0, *other) == jump_index(0, pc))
        .unwrap()
}

fn insert(space: &mut AddressSpace, pc: u64, code: u64) {
    space.insert_jump(0, JumpEntry { pc, code }, (pc, pc), false);
}

#[test]
fn two_addresses_of_one_line_are_both_found() {
    let mut spaces = Spaces::new().unwrap();
    let number = spaces.add().unwrap();
    let space = &mut spaces[number];
    let (first, second) = (0x40_1000, rival(0x40_1000));
    insert(space, first, 1);
    insert(space, second, 2);
    assert_eq!(space.jump(0, first), Some(1));
    assert_eq!(space.jump(0, second), Some(2));
}

#[test]
fn an_address_that_moved_to_the_neighbouring_line_is_forgotten_and_flushed() {
    let mut spaces = Spaces::new().unwrap();
    let number = spaces.add().unwrap();
    let space = &mut spaces[number];
    let (first, second) = (0x40_1000, rival(0x40_1000));
    insert(space, first, 1);
    insert(space, second, 2);
    space.forget_jump(first);
    assert_eq!(space.jump(0, first), None);
    insert(space, first, 3);
    assert_eq!(space.jump(0, second), Some(2));
    space.flush(true);
    assert_eq!(space.jump(0, first), None);
    assert_eq!(space.jump(0, second), None);
}

#[test]
fn address_0_is_in_no_line_of_an_empty_jump_cache() {
    let mut spaces = Spaces::new().unwrap();
    let number = spaces.add().unwrap();
    let space = &mut spaces[number];
    let empty = |space: &AddressSpace| {
        let table = &space.jumps[0];
        let line = jump_index(0, 0);
        [line, line ^ JUMP_NEIGHBOUR].map(|line| table[line].pc != 0) == [true, true]
    };
    assert!(empty(space));
    insert(space, 0, 1);
    insert(space, rival(0), 2);
    space.flush_jumps();
    assert!(empty(space));
}
