//! Tests of contents on a pool that no mount shows. They need root and nothing else.

use super::*;
use crate::error::Error;
use crate::pool::Sizes;
use crate::sys::tmpfs;
use crate::units::{FOLIO_SIZE, PageSize, SUBPAGE_SIZE, Subpage};

const NODE: InodeId = InodeId(7);
/// The subpage that tests pass to [`refuse_to_be_written`].
const UNWRITABLE: Subpage = Subpage(25);

fn pool(pages: u64) -> Pool {
    Pool::fill(PageSize::Huge, &Sizes::Anywhere(pages), |_| Ok(())).expect("root takes memory")
}

/// An object of `size` bytes, each of which is `byte`.
fn filled(pool: &Pool, size: u64, byte: u8) -> Object {
    let object = Object::new(NODE, Holding::create(PageSize::Huge).unwrap(), Arc::default());
    assert_eq!(
        object.write(&vec![byte; size as usize], 0, context(pool, &Pace::steady())).unwrap() as u64,
        size
    );
    object
}

fn context<'a>(pool: &'a Pool, pace: &'a Pace) -> Context<'a> {
    Context {
        pool,
        recovery_write: true,
        keep_punched: false,
        placement: None,
        repaired: &|_| {},
        pace,
    }
}

/// Makes writes to a subpage fail although no record says that it is quarantined. A memory error
/// has this effect before it is noted. The function punches the subpage, and another file of the
/// superblock takes the block.
fn refuse_to_be_written(object: &Object, subpage: Subpage) {
    const ELSEWHERE: u64 = 1 << 40;
    tmpfs::punch(object.data(), subpage.range()).unwrap();
    let ledger = object.read_lock().sealed().notes().file().unwrap();
    tmpfs::allocate(&ledger, Range::at(ELSEWHERE, SUBPAGE_SIZE)).unwrap();
}

fn bytes_of(object: &Object, length: u64) -> Vec<u8> {
    let mut bytes = vec![0; length as usize];
    assert_eq!(tmpfs::read_at(object.data(), &mut bytes, 0).unwrap() as u64, length);
    bytes
}

#[test]
fn a_short_write_returns_its_true_prefix() {
    let pool = pool(4);
    let object = filled(&pool, FOLIO_SIZE, 1);
    object.quarantine(b"0x80000 4096", &pool, &Pace::steady()).unwrap();
    refuse_to_be_written(&object, UNWRITABLE);
    let written = object.write(&vec![2; 1 << 20], 0, context(&pool, &Pace::steady())).unwrap();
    assert_eq!(written as u64, UNWRITABLE.offset());
    let bytes = bytes_of(&object, UNWRITABLE.offset());
    assert!(
        bytes.iter().all(|byte| *byte == 2),
        "bytes that were said to be written have their old value"
    );
    assert!(
        object.read_lock().sealed().is_lost(Subpage(128)),
        "what is behind the prefix is as before"
    );
}

#[test]
fn a_write_that_ends_at_its_start_is_an_error() {
    let pool = pool(4);
    let object = filled(&pool, FOLIO_SIZE, 1);
    object.quarantine(b"0x80000 4096", &pool, &Pace::steady()).unwrap();
    refuse_to_be_written(&object, UNWRITABLE);
    let written =
        object.write(&vec![2; 1 << 20], UNWRITABLE.offset(), context(&pool, &Pace::steady()));
    assert!(matches!(written, Err(Error::Full)), "{written:?}");
}

#[test]
fn a_short_write_lengthens_the_file_by_what_it_wrote() {
    let pool = pool(4);
    let object = filled(&pool, FOLIO_SIZE, 1);
    refuse_to_be_written(&object, UNWRITABLE);
    let written = object
        .write(&vec![2; 2 * FOLIO_SIZE as usize], 0, context(&pool, &Pace::steady()))
        .unwrap();
    assert_eq!(written as u64, UNWRITABLE.offset());
    assert_eq!(object.read_lock().sealed().size(), FOLIO_SIZE);
    assert_eq!(pool.balance().free, 3);
}

#[test]
fn zeroing_that_ends_early_is_an_error() {
    let pool = pool(4);
    let object = filled(&pool, FOLIO_SIZE, 1);
    refuse_to_be_written(&object, UNWRITABLE);
    let zeroed = object.allocate(Allocation::Zero, 0, 1 << 20, context(&pool, &Pace::steady()));
    assert!(zeroed.is_err(), "zeros were reported where the old bytes are");
}
