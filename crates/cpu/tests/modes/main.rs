//! The processor's modes, each left and entered as boot code does it: real mode, protected
//! mode with 16- and 32-bit segments, without paging, with 32-bit and PAE paging, IA-32e mode
//! with 64-bit and 32-bit code; and what protects and watches memory in them.
//!
//! The guest code is assembled in the tests and runs at 0x8000. It reports by writing words to
//! port 0x10; a write to port 0xf4 stops it.

#[macro_use]
mod machine;
mod protection;
mod transitions;
