//! The tests on real mounts that can share a process: a single program takes less time to build
//! than a program for each subject. `cargo test --test mounts contents::` runs one subject.
//!
//! The tests run on threads of one process. So a test here does not change the process: its limits,
//! directory, environment, signal handlers and namespaces. A test that does has a program of its
//! own, and so has a test that needs most of the machine's memory or processors.

mod backing;
mod check;
mod confined;
mod contents;
mod giving_way;
mod handles;
mod logging;
mod many_files;
mod memory;
mod mounting;
mod native;
mod placement;
mod prepared;
mod ready;
mod removal;
mod semantics;
mod smoke;
#[path = "../support/mod.rs"]
mod support;
mod takeover;
mod targets;
mod tree;
