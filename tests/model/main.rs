//! Random sequences of operations against a reference model.
//!
//! [`Model`] states the promises of the filesystem in readable form (bytes, sizes, pages, errors).
//! [`World`] carries out the operations in the real filesystem, from two processes. The answers of
//! both must agree, and so must the state after each operation.

mod comparing;
mod model;
mod operations;
#[path = "../support/mod.rs"]
mod support;
mod world;

use comparing::*;
use model::*;
use operations::*;
use world::*;

use hugetlb2fs::units::Range;
use proptest::prelude::*;
use proptest::test_runner::{Config, RngAlgorithm, TestCaseError, TestError, TestRng, TestRunner};
use rustix::fs::{AtFlags, CWD, FallocateFlags, Mode, OFlags, RenameFlags, SeekFrom, XattrFlags};
use rustix::io::Errno;
use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::hash::{BuildHasher, Hasher, RandomState};
use std::ops::ControlFlow;
use std::os::fd::AsFd;
use std::path::PathBuf;
use std::time::{Duration, Instant};
use support::sys::{Mapping, Sharing};
use support::{COLLAPSE, FOLIO, MAP, POISON, Pool, REPAIR, SUBPAGE, Toucher};

/// The pages of the pool, and the bytes in a page.
const PAGES: u64 = 8;
const PAGE: u64 = FOLIO;
/// The numbers of names, of descriptors that this process holds, and of mappings (the first is in
/// this process, the other in the toucher).
const NAMES: usize = 4;
const SLOTS: usize = 2;
const MAPPINGS: usize = 2;
/// The bytes of each mapping.
const MAPPED: u64 = 6 * PAGE;
/// A size beyond the largest file of this pool, and within the range of file sizes.
const ABSURD: u64 = 1 << 62;

/// The place of the bytes that an operation leaves.
fn place(op: &Op) -> Option<u64> {
    match *op {
        Op::Write { offset, .. } | Op::Store { offset, .. } | Op::Poison { offset, .. } => {
            Some(offset)
        }
        Op::Fallocate { offset, .. } => Some(offset),
        Op::Truncate { size, .. } if size < ABSURD => Some(size),
        Op::Repair { range: Some((offset, _)), .. } => Some(offset),
        _ => None,
    }
}

fn follow(world: &mut World<'_>, ops: &[Op], keeps: bool) -> Verdict {
    let mut model = Model { keeps, ..Model::default() };
    for (n, op) in ops.iter().enumerate() {
        if let Op::Load { mapping, offset } | Op::Store { mapping, offset, .. } = *op
            && !model.is_settled(mapping, offset)
        {
            continue;
        }
        let wanted = model.do_op(op);
        let found = world.do_op(op);
        let at_step =
            |error: TestCaseError| TestCaseError::fail(format!("step {n}, {op:?}: {error}"));
        match (&wanted, &found) {
            (Answer::Anything, Answer::Bytes(_)) => {}
            _ => agree("the answer", &found, &wanted).map_err(at_step)?,
        }
        world.compare(&model, place(op)).map_err(at_step)?;
    }
    for (name, id) in model.names.iter().enumerate() {
        if let Some(id) = id {
            let file = world.open(name, OFlags::empty()).expect("it was compared before");
            compare_whole(&file, &model.files[id])?;
        }
    }
    agree(
        "the check",
        &value(File::open(world.pool.path()).expect("the root"), support::CHECK),
        &String::new(),
    )
}

/// Leaves the pool as it was before the sequence: all pages free.
fn clean(mut world: World<'_>) -> Verdict {
    world.slots = [None, None];
    world.mapping = None;
    if world.toucher_maps {
        world.toucher.ask("unmap");
    }
    for name in 0..NAMES {
        // After most sequences only some of the names exist.
        let _ = rustix::fs::unlink(world.path(name));
    }
    world.compare_pool(&Model::default())
}

/// A pool and a toucher for many sequences. After a failed sequence they are in an unknown state,
/// so the next one gets new ones.
struct Stage {
    props: Option<(Pool, Toucher)>,
    /// The pool is mounted with `punch=keep`.
    keeps: bool,
}

impl Stage {
    fn set_up(&self) -> (Pool, Toucher) {
        let punch = if self.keeps { "keep" } else { "release" };
        let pool = Pool::mount(&format!("pagesize=2M,size={},punch={punch}", PAGES * FOLIO));
        (pool, Toucher::start())
    }

    fn play(&mut self, ops: &[Op]) -> Verdict {
        let (pool, mut toucher) = self.props.take().unwrap_or_else(|| self.set_up());
        let mut world = World::new(&pool, &mut toucher);
        let verdict = follow(&mut world, ops, self.keeps);
        let verdict = verdict.and(clean(world));
        if verdict.is_ok() {
            self.props = Some((pool, toucher));
        } else {
            eprintln!("{}", pool.log());
            drop(toucher);
        }
        verdict
    }
}

fn number_from_environment(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

#[test]
fn any_sequence_of_operations_does_what_the_model_says() {
    play_all(false);
}

#[test]
fn with_punched_pages_kept_operations_do_what_the_model_says() {
    play_all(true);
}

fn play_all(keeps: bool) {
    const CASES: u32 = 200;
    let cases = number_from_environment("PROPTEST_CASES").map_or(CASES, |cases| cases as u32);
    let seed = number_from_environment("MODEL_SEED").unwrap_or_else(|| {
        RandomState::new().build_hasher().finish() // the standard library seeds this at random
    });
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let config =
        Config { cases, failure_persistence: None, max_shrink_iters: 2000, ..Config::default() };
    let mut runner =
        TestRunner::new_with_rng(config, TestRng::from_seed(RngAlgorithm::ChaCha, &bytes));
    let stage = RefCell::new(Stage { props: None, keeps });
    match runner.run(&sequence(), |ops| stage.borrow_mut().play(&ops)) {
        Ok(()) => {}
        Err(TestError::Fail(why, ops)) => {
            let steps = ops
                .iter()
                .enumerate()
                .fold(String::new(), |text, (n, op)| text + &format!("  {n}: {op:?}\n"));
            panic!("{why}\nby\n{steps}MODEL_SEED={seed} repeats it")
        }
        Err(TestError::Abort(why)) => panic!("{why}"),
    }
    let last = stage.borrow_mut().props.take();
    if let Some((pool, toucher)) = last {
        drop(toucher);
        pool.check();
        pool.unmount();
    }
}
