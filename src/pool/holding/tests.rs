//! Changes that are refused, given up, or cut off by a death after any piece, on real superblocks.

use super::*;
use crate::pool::Sizes;
use crate::pool::moves::float_of;
use crate::pool::plan::Transfer;
use crate::pool::tests::adopt_one;
use crate::sys::tmpfs;

const SIZE: PageSize = PageSize::Huge;
/// Pages of a piece: a piece is never larger than the float.
const PIECE_PAGES: u64 = 2;
/// Four pages and two pieces. The last piece has one page.
const PAGES: u64 = 4 + 2 * PIECE_PAGES - 1;
const POOL: u64 = PAGES + 8;

fn pages(first: u64, end: u64) -> Range {
    SIZE.bytes_of(&(Page(first)..Page(end)))
}

fn pool() -> Pool {
    assert_eq!(float_of(POOL * FOLIO_SIZE), PIECE_PAGES * FOLIO_SIZE);
    Pool::fill(SIZE, &Sizes::Anywhere(POOL), |_| Ok(())).expect("root takes 34 MiB")
}

/// A file of `count` pages. Each page holds its number plus one.
fn file(pool: &Pool, count: u64) -> Holding {
    let mut holding = Holding::create(SIZE).expect("root makes superblocks");
    grow(pool, &mut holding, count).unwrap();
    for page in 0..count {
        let bytes = [page as u8 + 1; 16];
        assert_eq!(
            tmpfs::write_at(holding.sealed.data(), &bytes, page * FOLIO_SIZE).unwrap(),
            bytes.len()
        );
    }
    holding
}

fn grow(pool: &Pool, holding: &mut Holding, count: u64) -> Result<()> {
    let growth =
        holding.begin_growth(pool, Range::new(0, 0), count * FOLIO_SIZE, &Resolved::default())?;
    holding.complete(growth)
}

fn release(pool: &Pool, holding: &mut Holding, range: Range) -> Result<()> {
    let release = holding.begin_release(pool, range)?;
    holding.complete(release)
}

/// Every invariant of the pool holds. Each page of the pool is this holding's or free.
#[track_caller]
fn assert_sound(pool: &Pool, holding: &Holding) {
    assert_eq!(pool.check(&holding.held()), Vec::<String>::new());
    assert_eq!(pool.check_reserves().unwrap(), Vec::<String>::new());
    assert_eq!(holding.check().unwrap(), Vec::<String>::new());
    assert_eq!(holding.sealed.check().unwrap(), Vec::<String>::new());
}

#[track_caller]
fn assert_settled(pool: &Pool, holding: &Holding) {
    assert_sound(pool, holding);
    assert!(holding.is_settled() && holding.size() == holding.sealed.size());
    let account = pool.balance();
    assert_eq!((account.promised, account.free), (0, POOL - holding.pages()));
    for part in holding.owned_in(Range::new(0, holding.size())) {
        assert_eq!(holding.first_run(part, false), None);
    }
    for part in holding.released_in(Range::new(0, holding.size())) {
        assert!(part.folios().all(|folio| !holding.sealed.has_memory(folio)));
    }
}

/// The pages in `range` of the file hold the bytes that [`file`] wrote.
#[track_caller]
fn assert_kept(holding: &Holding, range: Range) {
    for start in range.folios().map(|folio| folio.range().start) {
        let mut bytes = [0; 16];
        assert_eq!(tmpfs::read_at(holding.sealed.data(), &mut bytes, start).unwrap(), bytes.len());
        assert_eq!(bytes, [(start / FOLIO_SIZE) as u8 + 1; 16], "page {}", start / FOLIO_SIZE);
    }
}

/// The holding as the next process finds it after a death with `change` under way.
fn after_death_in(pool: &Pool, holding: Holding, change: Change<'_>) -> Holding {
    drop(change);
    after_death(pool, holding)
}

/// The holding as the next process finds it after a death.
fn after_death(pool: &Pool, holding: Holding) -> Holding {
    let reserves = pool.reserves();
    let mount = holding.sealed.mount().unwrap();
    drop(holding);
    let sealed = Sealed::open(Reach::Programs, mount).unwrap();
    let mut again = Holding::open(SIZE, sealed, &pool.nodes()).unwrap();
    adopt_one(pool, &mut again);
    assert_eq!(pool.reserves(), reserves, "memory went to the machine, or came from there");
    let settling = again.begin_settling(pool);
    again.complete(settling).unwrap();
    again
}

/// Advances by `pieces` pieces. True if more are left.
fn advance(change: &mut Change<'_>, holding: &mut Holding, pieces: u64) -> bool {
    (0..pieces).all(|_| change.advance(holding).unwrap() == Progress::More)
}

/// Gives the change up and advances it to its end.
#[track_caller]
fn give_up(mut change: Change<'_>, holding: &mut Holding) {
    change.give_up(Error::Interrupted);
    assert!(matches!(holding.complete(change), Err(Error::Interrupted)));
}

// ---- refused -----------------------------------------------------------------------------------

#[test]
fn a_release_that_cannot_be_noted_leaves_the_page() {
    let pool = pool();
    let mut holding = file(&pool, 10);
    [1, 3, 5, 7]
        .into_iter()
        .for_each(|page| release(&pool, &mut holding, pages(page, page + 1)).unwrap());
    assert!(matches!(release(&pool, &mut holding, pages(9, 10)), Err(Error::Busy(_))));
    assert_kept(&holding, pages(8, 10));
    assert_settled(&pool, &holding);
    release(&pool, &mut holding, pages(2, 3)).unwrap(); // joins two runs
    release(&pool, &mut holding, pages(9, 10)).unwrap();
    assert_settled(&pool, &holding);
}

#[test]
fn a_growth_that_cannot_be_noted_takes_no_page() {
    let pool = pool();
    let mut holding = file(&pool, 10);
    for released in [pages(1, 2), pages(3, 4), pages(5, 6), pages(7, 10)] {
        release(&pool, &mut holding, released).unwrap();
    }
    let refused = holding.begin_growth(&pool, pages(8, 9), 0, &Resolved::default()).map(drop);
    assert!(matches!(refused, Err(Error::Busy(_))), "{refused:?}");
    assert_settled(&pool, &holding);
    let mut other = Holding::create(SIZE).unwrap();
    grow(&pool, &mut other, pool.balance().free).unwrap();
}

#[test]
fn a_growth_beyond_the_pool_changes_nothing() {
    let pool = pool();
    let mut holding = file(&pool, 10);
    assert!(matches!(grow(&pool, &mut holding, POOL + 1), Err(Error::Full)));
    assert_settled(&pool, &holding);
    assert_kept(&holding, pages(0, 10));
}

#[test]
fn soft_holes_refuse_what_would_move_memory_around_them() {
    let pool = pool();
    let mut holding = file(&pool, 4);
    release(&pool, &mut holding, pages(3, 4)).unwrap();
    holding.sealed.quarantine(Subpage(0).range(), 1).unwrap();
    assert!(
        holding
            .begin_growth(&pool, Range::new(0, 0), 6 * FOLIO_SIZE, &Resolved::default())
            .is_err()
    );
    assert!(holding.begin_allocation(&pool, pages(3, 4), &Resolved::default()).is_err());
    assert!(holding.begin_release(&pool, pages(1, 3)).is_err());
    assert!(holding.begin_shrinking(&pool, FOLIO_SIZE).is_err());
    assert_settled(&pool, &holding);
    assert_kept(&holding, pages(1, 3));
    let allocation = holding.begin_allocation(&pool, pages(4, 6), &Resolved::default()).unwrap();
    holding.complete(allocation).unwrap(); // behind the end of file no memory moves
    release(&pool, &mut holding, pages(0, 3)).unwrap(); // the hole goes with its page
    assert_settled(&pool, &holding);
}

#[test]
fn a_shrinking_without_a_piece_leaves_pages_behind_the_end() {
    let pool = pool();
    let mut holding = file(&pool, 4);
    let allocation = holding.begin_allocation(&pool, pages(4, 6), &Resolved::default()).unwrap();
    holding.complete(allocation).unwrap();
    let shrinking = holding.begin_shrinking(&pool, FOLIO_SIZE).unwrap();
    give_up(shrinking, &mut holding);
    assert_eq!((holding.size(), holding.pages()), (4 * FOLIO_SIZE, 6));
    assert_settled(&pool, &holding);
}

#[test]
fn a_piece_gives_back_few_soft_holes() {
    let pool = pool();
    let mut holding = file(&pool, 4);
    for folio in 0..3 {
        (0..150).for_each(|n| {
            holding.sealed.quarantine(Subpage(folio * 512 + 2 * n).range(), 1).unwrap()
        });
    }
    let mut change = holding.begin_release(&pool, pages(0, 4)).unwrap();
    let mut given = Vec::new();
    while change.advance(&mut holding).unwrap() == Progress::More {
        given.push(450 - holding.sealed.holes().count());
    }
    assert_eq!(given, [150, 300, 450], "128 at a time, and what their folio has besides");
    assert_eq!(holding.pages(), 0);
    assert_settled(&pool, &holding);
}

// ---- given up ----------------------------------------------------------------------------------

#[test]
fn a_growth_given_up_after_any_piece_leaves_all_as_before() {
    for pieces in 0.. {
        let pool = pool();
        let mut holding = file(&pool, 4);
        release(&pool, &mut holding, pages(1, 3)).unwrap();
        let range = pages(1, PAGES);
        let mut growth =
            holding.begin_growth(&pool, range, range.end - 5000, &Resolved::default()).unwrap();
        let more = advance(&mut growth, &mut holding, pieces);
        if !more {
            assert_eq!(pieces, 4, "the released pages, two pieces behind the end, the account");
            assert_eq!((holding.size(), holding.pages()), (range.end - 5000, PAGES));
            assert_settled(&pool, &holding);
            return;
        }
        assert_eq!(holding.size(), 4 * FOLIO_SIZE, "the old size is seen until all is there");
        assert_sound(&pool, &holding);
        give_up(growth, &mut holding);
        assert_eq!((holding.size(), holding.pages()), (4 * FOLIO_SIZE, 2));
        assert!(!holding.has_pages(pages(1, 2)) && !holding.has_pages(pages(2, 3)));
        assert_settled(&pool, &holding);
        assert_kept(&holding, pages(3, 4));
        grow(&pool, &mut holding, PAGES).unwrap();
        assert_settled(&pool, &holding);
    }
}

#[test]
fn a_shrinking_given_up_leaves_the_file_shorter() {
    for pieces in 0.. {
        let pool = pool();
        let mut holding = file(&pool, PAGES);
        let mut shrinking = holding.begin_shrinking(&pool, 5000).unwrap();
        if !advance(&mut shrinking, &mut holding, pieces) {
            assert_eq!((holding.size(), holding.pages()), (5000, 1));
            assert_settled(&pool, &holding);
            return;
        }
        assert_sound(&pool, &holding);
        let left = PAGES - (pieces * PIECE_PAGES).min(PAGES - 1);
        assert_eq!(holding.size(), left * FOLIO_SIZE, "after {pieces} pieces");
        give_up(shrinking, &mut holding);
        assert_eq!((holding.size(), holding.pages()), (left * FOLIO_SIZE, left));
        assert_kept(&holding, pages(0, left));
        assert_settled(&pool, &holding);
    }
}

#[test]
fn a_release_given_up_has_released_some_pages_and_no_other() {
    for pieces in 0.. {
        let pool = pool();
        let mut holding = file(&pool, PAGES);
        let mut change = holding.begin_release(&pool, pages(1, PAGES)).unwrap();
        if !advance(&mut change, &mut holding, pieces) {
            assert_eq!((holding.size(), holding.pages()), (PAGES * FOLIO_SIZE, 1));
            assert_settled(&pool, &holding);
            return;
        }
        assert_sound(&pool, &holding);
        give_up(change, &mut holding);
        let left = PAGES - (pieces * PIECE_PAGES).min(PAGES - 1);
        assert_eq!((holding.size(), holding.pages()), (PAGES * FOLIO_SIZE, left));
        assert_kept(&holding, pages(0, left));
        assert_settled(&pool, &holding);
        let holding = after_death(&pool, holding);
        assert_eq!(holding.pages(), left, "what is noted is what was released");
        assert_settled(&pool, &holding);
    }
}

// ---- a death between two pieces ----------------------------------------------------------------

#[test]
fn a_death_after_any_piece_of_a_growth_undoes_it() {
    let pieces = 3; // the memory of the released page counts as one
    for done in 0..=pieces {
        let pool = pool();
        let mut holding = file(&pool, 4);
        release(&pool, &mut holding, pages(3, 4)).unwrap();
        let mut growth = holding
            .begin_growth(&pool, pages(3, 4), PAGES * FOLIO_SIZE, &Resolved::default())
            .unwrap();
        assert!(advance(&mut growth, &mut holding, done));
        let holding = after_death_in(&pool, holding, growth);
        assert_eq!(holding.size(), 4 * FOLIO_SIZE);
        assert_kept(&holding, pages(0, 3));
        assert_settled(&pool, &holding);
    }
}

#[test]
fn a_death_while_a_growth_is_undone_undoes_it() {
    for undone in 0..3 {
        let pool = pool();
        let mut holding = file(&pool, 4);
        let mut growth = holding
            .begin_growth(&pool, Range::new(0, 0), PAGES * FOLIO_SIZE, &Resolved::default())
            .unwrap();
        assert!(advance(&mut growth, &mut holding, 2));
        growth.give_up(Error::Interrupted);
        assert!(advance(&mut growth, &mut holding, undone));
        let holding = after_death_in(&pool, holding, growth);
        assert_eq!((holding.size(), holding.pages()), (4 * FOLIO_SIZE, 4));
        assert_kept(&holding, pages(0, 4));
        assert_settled(&pool, &holding);
    }
}

#[test]
fn a_death_after_any_piece_of_a_shrinking_leaves_it_shorter() {
    for done in 0..=3 {
        let pool = pool();
        let mut holding = file(&pool, PAGES);
        let mut shrinking = holding.begin_shrinking(&pool, 2 * FOLIO_SIZE).unwrap();
        advance(&mut shrinking, &mut holding, done);
        let size = holding.size();
        let holding = after_death_in(&pool, holding, shrinking);
        assert_eq!(holding.size(), size);
        assert_kept(&holding, Range::new(0, size));
        assert_sound(&pool, &holding);
    }
}

#[test]
fn a_death_within_a_release_leaves_no_page_in_part() {
    for done in 0..=3 {
        let pool = pool();
        let mut holding = file(&pool, PAGES);
        let mut change = holding.begin_release(&pool, pages(1, PAGES)).unwrap();
        advance(&mut change, &mut holding, done);
        let left = holding.pages();
        let holding = after_death_in(&pool, holding, change);
        assert_eq!(holding.pages(), left);
        assert_kept(&holding, pages(0, left));
        assert_settled(&pool, &holding);
    }
}

#[test]
fn a_page_of_which_a_part_was_moved_is_whole_after_a_death() {
    const GIB: u64 = PageSize::Gigantic.bytes();
    let pool =
        Pool::fill(PageSize::Gigantic, &Sizes::Anywhere(1), |_| Ok(())).expect("root takes 1 GiB");
    let mut holding = Holding::create(PageSize::Gigantic).unwrap();
    let growth =
        holding.begin_growth(&pool, Range::new(0, 0), GIB - 5000, &Resolved::default()).unwrap();
    holding.complete(growth).unwrap();
    let mut change = holding.begin_release(&pool, Range::new(0, GIB)).unwrap();
    assert!(advance(&mut change, &mut holding, 3));
    assert_sound(&pool, &holding);
    assert_eq!(holding.pages(), 1, "a page is the file's until it has no memory");
    let mount = holding.sealed.mount().unwrap();
    drop(holding);
    let sealed = Sealed::open(Reach::Programs, mount).unwrap();
    let mut holding = Holding::open(PageSize::Gigantic, sealed, &pool.nodes()).unwrap();
    adopt_one(&pool, &mut holding);
    let settling = holding.begin_settling(&pool);
    holding.complete(settling).unwrap();
    assert_eq!((holding.pages(), holding.sealed.folio_count()), (1, GIB / FOLIO_SIZE));
    assert_sound(&pool, &holding);
    // A release that is given up in the middle of the page still ends with the page.
    let mut change = holding.begin_release(&pool, Range::new(0, GIB)).unwrap();
    assert!(advance(&mut change, &mut holding, 3));
    give_up(change, &mut holding);
    assert_eq!((holding.pages(), holding.sealed.folio_count()), (0, 0));
    assert_sound(&pool, &holding);
}

// ---- what cannot be undone ---------------------------------------------------------------------

/// A holding with a growth that has moved memory and could not be undone.
fn stuck_growth(pool: &Pool) -> Holding {
    let mut holding = file(pool, 4);
    release(pool, &mut holding, pages(1, 2)).unwrap();
    let mut growth =
        holding.begin_growth(pool, pages(1, 2), PAGES * FOLIO_SIZE, &Resolved::default()).unwrap();
    assert!(advance(&mut growth, &mut holding, 2));
    let Change(Kind::Growth(mut growth)) = growth else { panic!("it grows") };
    growth.leave_unsettled(&mut holding, &Error::NoMemory);
    holding.under_way = false;
    holding
}

#[test]
fn memory_that_is_stuck_in_a_file_is_promised_once() {
    let pool = pool();
    let mut holding = stuck_growth(&pool);
    assert_eq!(holding.size(), 4 * FOLIO_SIZE);
    assert_sound(&pool, &holding);
    let mut other = Holding::create(SIZE).unwrap();
    grow(&pool, &mut other, pool.balance().free).unwrap();
    let shrinking = other.begin_shrinking(&pool, 0).unwrap();
    other.complete(shrinking).unwrap();
    // The next change settles the holding first.
    grow(&pool, &mut holding, 5).unwrap();
    assert_eq!(holding.size(), 5 * FOLIO_SIZE);
    assert_kept(&holding, pages(2, 4));
    assert_settled(&pool, &holding);
}

#[test]
fn memory_that_is_stuck_in_a_file_comes_back_when_the_file_goes() {
    let pool = pool();
    let mut holding = stuck_growth(&pool);
    let shrinking = holding.begin_shrinking(&pool, 0).unwrap();
    holding.complete(shrinking).unwrap();
    assert_eq!(pool.balance().free, POOL);
    assert_settled(&pool, &holding);
}

#[test]
fn memory_that_is_stuck_in_a_file_is_settled_after_a_death() {
    let pool = pool();
    let holding = after_death(&pool, stuck_growth(&pool));
    assert_eq!(holding.size(), 4 * FOLIO_SIZE);
    assert_kept(&holding, pages(2, 4));
    assert_settled(&pool, &holding);
}

/// The report of the check after `damage` to a file of four pages, the third of which is released.
fn found_after(damage: impl FnOnce(&Pool, &mut Holding)) -> String {
    let pool = pool();
    let mut holding = file(&pool, 4);
    release(&pool, &mut holding, pages(2, 3)).unwrap();
    assert_sound(&pool, &holding);
    damage(&pool, &mut holding);
    let mut found = holding.check().unwrap();
    found.extend(pool.check(&holding.held()));
    found.join("; ")
}

fn page(number: u64) -> Run {
    Page(number)..Page(number + 1)
}

#[test]
fn the_check_names_each_broken_account() {
    let account = |change: fn(&mut crate::pool::Account)| {
        found_after(|pool, _| {
            let node = pool.nodes()[0];
            change(pool.accounts.lock().unwrap().of_mut(node));
        })
    };
    let grown = account(|account| account.total += 1);
    assert!(grown.contains("files have 3 pages, and the account says 4"), "{grown}");
    let handed_back = account(|account| account.free += 1 + PIECE_PAGES); // more than the float
    assert!(handed_back.contains("pages are free, and the reserve has"), "{handed_back}");
    let leaked = account(|account| {
        account.free -= 1;
        account.promised += 1;
    });
    let meant = "1 pages are promised, 0 for changes under way and 0 for stuck memory";
    assert!(leaked.ends_with(meant), "{leaked}");
}

#[test]
fn the_check_names_each_page_that_is_not_as_noted() {
    let lost = found_after(|_, holding| holding.released.remove(page(2)));
    assert!(lost.contains("1 pages are noted as released, and 0 are"), "{lost}");
    assert!(lost.contains("is the file's and has no memory"), "{lost}");
    let kept = found_after(|_, holding| holding.released.insert(page(0)));
    assert!(kept.contains("folio 0 is released and has memory"), "{kept}");
    let uncovered = found_after(|_, holding| {
        holding.sealed.update(|header| header.owned_pages = 3).unwrap();
    });
    assert!(uncovered.contains("3 pages are the file's, which has 8388608 bytes"), "{uncovered}");
    let announced = found_after(|_, holding| {
        holding.sealed.update(|header| header.undo_size = Some(4 * FOLIO_SIZE)).unwrap();
    });
    assert!(announced.contains("a size to come back to is noted"), "{announced}");
}

#[test]
fn the_check_names_memory_that_moved_without_its_page() {
    let moved = found_after(|pool, holding| {
        let size = holding.sealed.size();
        let transfer =
            Transfer { range: Range::at(2 * FOLIO_SIZE, FOLIO_SIZE), node: pool.nodes()[0] };
        let take = |sealed: &mut Sealed, piece| sealed.take(piece, size);
        pool.move_piece_out(&mut holding.sealed, transfer, FOLIO_SIZE, take).unwrap();
    });
    assert!(moved.contains("folio 2 is released and has memory"), "{moved}");
}

/// An empty file with the memory of five pages behind its end.
fn five_ahead(pool: &Pool) -> Holding {
    let mut holding = Holding::create(SIZE).expect("root makes superblocks");
    holding.own_ahead(pool, 5, &Resolved::default()).unwrap();
    while let Some(piece) = holding.take_ahead(pool).unwrap() {
        tmpfs::clear(holding.sealed.data(), piece).unwrap();
        assert_sound(pool, &holding);
    }
    holding.end_ahead();
    assert_eq!((holding.size(), holding.pages_ahead()), (0, 5));
    assert_eq!(holding.held().bytes.total(), 5 * FOLIO_SIZE);
    assert_settled(pool, &holding);
    holding
}

#[test]
fn memory_ahead_becomes_the_files_without_a_move() {
    let pool = pool();
    for (count, ahead) in [(3, 2), (5, 0), (7, 0)] {
        let mut holding = five_ahead(&pool);
        grow(&pool, &mut holding, count).unwrap();
        assert_eq!((holding.pages(), holding.pages_ahead()), (count.max(5), ahead));
        assert_settled(&pool, &holding);
        let mut bytes = vec![1; (count * FOLIO_SIZE) as usize];
        assert_eq!(tmpfs::read_at(holding.sealed.data(), &mut bytes, 0).unwrap(), bytes.len());
        assert!(bytes.iter().all(|byte| *byte == 0), "it is cleared");
        holding.return_ahead(&pool).unwrap();
        assert_eq!((holding.pages(), holding.pages_ahead()), (count, 0));
        assert_settled(&pool, &holding);
        let shrinking = holding.begin_shrinking(&pool, 0).unwrap();
        holding.complete(shrinking).unwrap();
        assert_settled(&pool, &holding);
    }
}

/// The worker dies, or the growth is given up, after each piece.
#[test]
fn memory_ahead_survives_what_ends_a_growth_early() {
    for (pieces, dies) in (0..2).flat_map(|pieces| [(pieces, false), (pieces, true)]) {
        let pool = pool();
        let mut holding = five_ahead(&pool);
        let placement = Resolved::default();
        let size = PAGES * FOLIO_SIZE;
        let mut growth = holding.begin_growth(&pool, Range::new(0, 0), size, &placement).unwrap();
        assert!(advance(&mut growth, &mut holding, pieces), "it is under way");
        let mut holding = if dies {
            after_death_in(&pool, holding, growth)
        } else {
            give_up(growth, &mut holding);
            holding
        };
        assert_eq!(holding.size(), 0);
        holding.return_ahead(&pool).unwrap();
        assert_eq!(holding.pages(), 0);
        assert_settled(&pool, &holding);
    }
}
