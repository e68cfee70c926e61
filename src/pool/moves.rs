//! Moves of memory between a file and the reserves, piece by piece, and the float, which is at
//! stake meanwhile.
//!
//! ```text
//!            reserve                      machine                     file
//!   free pages      | float        gives ---> takes
//!   ================|=====-------->  piece  ---------------------->  =====      move out
//!   ================|=====<--------  piece  <----------------------  =====      move in
//! ```
//!
//! Memory changes hands by way of the machine, as tmpfs has no other way. The source gives a piece
//! to the machine, and the target takes as much at once. So a move needs no memory beyond the pool,
//! however little the machine has left.
//!
//! Between the two calls another process can take the memory that was given. For this case the pool
//! holds more memory than its pages have: the *float* ([`float_of`]). A piece is never larger than
//! the rest of the float, and one piece moves at a time, so a loss is the float's loss. Where
//! nothing of the float is left, a free page is put at stake in its place, and the piece is one
//! folio. Pages of files and reserved pages are never at stake.
//!
//! **Short.** The bytes that the pool lacks of its pages and its float are noted in the account
//! ([`Account::short`]). The patrol takes them from the machine again each second, if the machine
//! has some ([`Pool::refill`]). A move that finds the float used up does so, too; if it then finds
//! neither float nor free page, it is refused. The daemon stores no note of this for the next
//! worker, which computes the lack from the bytes that are there.
//!
//! If more is short than the float, as many free pages are *missing*: the pool does not hand them
//! out. This happens when a program has given memory of its file to the machine by MADV_REMOVE, and
//! the worker died before it took the memory back.
//!
//! **Loans.** A quarantine or a repair needs memory for a second copy of some bytes, and then frees
//! the memory of the first copy. The float lends it ([`Pool::with_loan`]): a reserve gives a folio
//! to the machine, and takes one back when the change has ended. The account counts the folio as
//! short in between. So pieces can move during the change, and after a death the pool lacks a
//! folio, as after a death in a move.
//!
//! If the machine is short of memory, the pool asks for one folio at a time. The kernel keeps
//! memory that a processor has just freed on that processor's own list (mm/page_alloc.c,
//! `free_frozen_page_commit`), and serves the very next allocation from that list.

use super::{Account, Opened, Pool, Reserve, Token};
use crate::error::{Error, Result};
use crate::sealed::Sealed;
use crate::steps::{self, Step};
use crate::sys::policy::{self, Policy};
use crate::sys::{self, MARGIN, refuse_more_than_available};
use crate::units::{FOLIO_SIZE, NumaNode, Range};
use std::sync::MutexGuard;

/// The most memory that moves between a file and the reserves at once. A piece of this size takes
/// some milliseconds; other callers wait for that long.
pub const PIECE: u64 = 32 << 20;

/// A change that takes no more than this needs no loan, as any system call can take as much for
/// itself.
const LITTLE: u64 = 64 << 10;

/// The float of a small pool.
const LEAST_FLOAT: u64 = 2 * FOLIO_SIZE;

/// Bytes of the float of a pool whose pages have `bytes` bytes.
pub fn float_of(bytes: u64) -> u64 {
    (bytes / 64).next_multiple_of(FOLIO_SIZE).clamp(LEAST_FLOAT, PIECE)
}

/// Bytes that may move at once, if the machine has `available` bytes and `float` bytes of the float
/// are there.
fn longest_piece(available: u64, float: u64) -> u64 {
    let most = if available < PIECE + MARGIN { FOLIO_SIZE } else { PIECE };
    most.min(float)
}

impl Account {
    /// Sets the bytes that the pool lacks of its pages, of `page_size` bytes each, and their float.
    pub(super) fn set_short(&mut self, short: u64, page_size: u64) {
        self.short = short;
        self.missing = short.saturating_sub(float_of(self.total * page_size)).div_ceil(page_size);
    }

    /// Sets the number of the pool's pages, of `page_size` bytes each.
    pub(super) fn set_total(&mut self, total: u64, page_size: u64) {
        self.total = total;
        self.set_short(self.short, page_size);
    }
}

/// Held during the move of a piece.
type Moving<'a> = MutexGuard<'a, ()>;

/// The right to move a piece.
struct Piece<'pool> {
    _moving: Moving<'pool>,
    /// The most bytes that the piece may have.
    most: u64,
    /// A free page, where nothing of the float is left. No file is promised this page until the
    /// piece has moved.
    _at_stake: Option<Token<'pool>>,
}

impl Pool {
    /// Bytes of all the memory of a pool of `pages` pages, with the float.
    pub(super) fn bytes_of(&self, pages: u64) -> u64 {
        let bytes = pages * self.page_size.bytes();
        bytes + float_of(bytes)
    }

    /// Waits until no piece moves, and keeps other threads from moving one. This lock comes before
    /// those of the reserves.
    pub(super) fn moving(&self) -> Moving<'_> {
        self.moving.lock().expect("no panic while memory moves")
    }

    /// The pool lacks `bytes` more.
    pub(super) fn note_short(&self, bytes: u64) {
        let mut account = self.account();
        let short = account.short + bytes;
        account.set_short(short, self.page_size.bytes());
    }

    /// The pool lacks up to `bytes` less, because it has taken them or needs them no more. Returns
    /// the part of `bytes` that the pool did lack.
    pub(super) fn lack_less(&self, bytes: u64) -> u64 {
        let mut account = self.account();
        let lacked = account.short.min(bytes);
        let short = account.short - lacked;
        account.set_short(short, self.page_size.bytes());
        lacked
    }

    /// Bytes of the float that are there.
    fn float_at_hand(&self) -> u64 {
        let account = self.account();
        float_of(account.total * self.page_size.bytes()).saturating_sub(account.short)
    }

    /// True if no piece can move before the pool takes some memory from the machine, or puts a free
    /// page at stake.
    pub(super) fn is_float_used_up(&self) -> bool {
        self.float_at_hand() < FOLIO_SIZE
    }

    /// Takes the lacking bytes from the machine, as far as the machine can give them. Other moves
    /// go on between two steps.
    pub fn refill(&self) {
        while self.balance().short > 0 && self.refill_step(&self.moving()) {}
    }

    /// Takes a piece of the lacking bytes. Returns true if the machine had one.
    fn refill_step(&self, _moving: &Moving<'_>) -> bool {
        let short = self.account().short;
        let affordable = |step: &u64| *step > 0 && refuse_more_than_available(*step).is_ok();
        let step = [short.min(PIECE), short.min(FOLIO_SIZE)].into_iter().find(affordable);
        step.is_some_and(|step| self.take_lacking(step))
    }

    /// Takes `bytes` of the lacking bytes. Returns true if the machine had them. No piece moves
    /// meanwhile.
    fn take_lacking(&self, bytes: u64) -> bool {
        if let Err(error) = self.lengthen(&mut self.lock_poorest().1, bytes) {
            log::warn!("the pool lacks {bytes} bytes still: {error}");
            return false;
        }
        self.give_surplus(bytes - self.lack_less(bytes)); // the pool may have shrunk meanwhile
        self.freed.notify_all(); // pages that were missing are free now
        true
    }

    /// Runs `work` with a loan of the float. `work` takes up to `bytes` of memory, a folio at most,
    /// and then frees as much.
    ///
    /// # Errors
    /// [`Error::NoMemory`] where nothing is left to lend; `work` has not run. The errors of `work`.
    pub fn with_loan<T>(&self, bytes: u64, work: impl FnOnce() -> Result<T>) -> Result<T> {
        assert!(bytes <= FOLIO_SIZE, "a loan is a folio");
        let at_stake = if bytes > LITTLE { Some(self.lend()?) } else { None };
        let result = work();
        if at_stake.is_some() {
            self.take_loan_back();
            steps::reached(Step::LendTaken);
        }
        result
    }

    /// A reserve gives a folio to the machine. Returns the page at stake, if there is one.
    fn lend(&self) -> Result<Option<Token<'_>>> {
        let Piece { _moving, _at_stake, .. } = self.begin_piece()?;
        let (_, mut source) = self.lock_richest();
        // Pages are missing.
        let left = source.size().checked_sub(FOLIO_SIZE).ok_or(Error::NoMemory)?;
        shorten(&mut source, left)?;
        steps::reached(Step::LendGiven);
        self.note_short(FOLIO_SIZE);
        Ok(_at_stake)
    }

    /// Takes a folio back. If another process has taken the memory, the patrol takes a folio later.
    /// If the patrol has done so already, nothing is lacking.
    fn take_loan_back(&self) {
        let _moving = self.moving();
        let bytes = FOLIO_SIZE.min(self.account().short);
        if bytes > 0 {
            self.take_lacking(bytes);
        }
    }

    /// Begins to move a piece. If the machine is short of memory, the piece is a folio.
    fn begin_piece(&self) -> Result<Piece<'_>> {
        let moving = self.moving();
        while self.is_float_used_up() && self.refill_step(&moving) {}
        match longest_piece(sys::memory_available()?, self.float_at_hand()) {
            0 => {
                let at_stake = self.reserve(1).map_err(|_| Error::NoMemory)?;
                Ok(Piece { _moving: moving, most: FOLIO_SIZE, _at_stake: Some(at_stake) })
            }
            most => Ok(Piece { _moving: moving, most, _at_stake: None }),
        }
    }

    /// Moves a piece of memory into `target`, for the start of `range`, which has no memory. Makes
    /// `target` longer for that, up to `size` bytes. Returns the length of the piece.
    ///
    /// # Errors
    /// [`Error::NoMemory`] where nothing is left to put at stake, or where other processes have
    /// taken the memory that was given. No memory has moved, but `target` may be longer.
    pub(super) fn move_piece_out(
        &self,
        target: &mut Sealed,
        range: Range,
        size: u64,
    ) -> Result<u64> {
        let begun = self.begin_piece()?;
        let (reserve, mut source) = self.lock_richest();
        let _preferred = self.prefer(reserve.node);
        let piece = range.len().min(begun.most).min(source.size());
        match self.exchange(&mut source, target, Range::at(range.start, piece), size) {
            Err(Error::NoMemory) if piece > FOLIO_SIZE && self.float_at_hand() >= FOLIO_SIZE => {
                self.exchange(&mut source, target, Range::at(range.start, FOLIO_SIZE), size)
            }
            result => result,
        }
    }

    /// The reserve `source` gives memory, and `target` takes as much for `piece`. Returns the
    /// number of bytes.
    fn exchange(
        &self,
        source: &mut Sealed,
        target: &mut Sealed,
        piece: Range,
        size: u64,
    ) -> Result<u64> {
        let left = source.size().checked_sub(piece.len()).filter(|_| !piece.is_empty());
        let left = left.ok_or(Error::NoMemory)?; // pages are missing
        shorten(source, left)?;
        steps::reached(Step::MoveOutGiven);
        if let Err(error) = target.take(piece, size) {
            self.take_back(source, piece.len());
            return Err(error);
        }
        steps::reached(Step::MoveOutTaken);
        Ok(piece.len())
    }

    /// Moves a piece of memory back into the reserves: the last part of `range` that has memory.
    /// `give` takes the memory out of `source`. Returns the part that moved, or `None` where
    /// `range` has no memory.
    ///
    /// # Errors
    /// [`Error::NoMemory`] where nothing is left to put at stake; nothing has moved. The errors of
    /// `give`.
    pub(super) fn move_piece_in(
        &self,
        source: &mut Sealed,
        range: Range,
        give: impl FnOnce(&mut Sealed, Range) -> Result<()>,
    ) -> Result<Option<Range>> {
        if !range.folios().any(|folio| source.has_memory(folio)) {
            return Ok(None);
        }
        let begun = self.begin_piece()?;
        let Some(piece) = self.last_piece_within(source, range, begun.most) else {
            return Ok(None);
        };
        let mut target = self.reserve_for(source, piece).lock();
        let given = give(source, piece);
        if given.is_err() && piece.folios().any(|folio| source.has_memory(folio)) {
            return given.map(|()| None);
        }
        steps::reached(Step::MoveInGiven);
        self.take_back(&mut target, piece.len());
        steps::reached(Step::MoveInTaken);
        given.map(|()| Some(piece))
    }

    /// A reserve takes the memory that was given just now. If another process has taken it first,
    /// the pool is short of it.
    fn take_back(&self, reserve: &mut Sealed, bytes: u64) {
        if let Err(error) = self.lengthen(reserve, bytes) {
            log::warn!(
                "another process has caught {bytes} bytes of the pool, which takes them again later: {error}"
            );
            self.note_short(bytes);
        }
    }

    fn lengthen(&self, reserve: &mut Sealed, bytes: u64) -> Result<()> {
        let size = reserve.size();
        reserve.take(Range::at(size, bytes), size + bytes)
    }

    /// The last run of folios with memory in `range`: of one NUMA node, at most `most` bytes long.
    fn last_piece_within(&self, source: &Sealed, range: Range, most: u64) -> Option<Range> {
        let mut folios = range.folios().rev().skip_while(|folio| !source.has_memory(*folio));
        let last = folios.next()?;
        let node = self.node_of(source, last);
        let before = folios
            .take((most / FOLIO_SIZE) as usize - 1)
            .take_while(|folio| source.has_memory(*folio) && self.node_of(source, *folio) == node)
            .count() as u64;
        let end = last.range().end;
        Some(Range::new(end - (before + 1) * FOLIO_SIZE, end))
    }

    fn node_of(&self, source: &Sealed, folio: crate::units::Folio) -> Option<NumaNode> {
        if self.reserves.len() == 1 { None } else { source.node_of(folio) }
    }

    fn reserve_for(&self, source: &Sealed, piece: Range) -> &Reserve {
        let node = piece.folios().next().and_then(|folio| self.node_of(source, folio));
        self.reserves.iter().find(|reserve| Some(reserve.node) == node).unwrap_or(&self.reserves[0])
    }

    /// Until the guard is dropped, the kernel takes new memory of this thread from NUMA node
    /// `node`, as far as that node has some.
    fn prefer(&self, node: NumaNode) -> Option<Preference> {
        if self.reserves.len() == 1 {
            return None;
        }
        match policy::set_for_thread(Policy::Prefer(node)) {
            Ok(()) => Some(Preference),
            Err(error) => {
                log::debug!("node {node} cannot be preferred, as the cpuset has changed: {error}");
                None
            }
        }
    }

    /// The reserve with the most memory. All reserves are locked for the choice, so the result has
    /// memory if any reserve has.
    pub(super) fn lock_richest(&self) -> (&Reserve, Opened<'_>) {
        let richest = self.lock_all().max_by_key(|(_, sealed)| sealed.size());
        richest.expect("there is a node with memory")
    }

    /// The reserve with the least memory.
    fn lock_poorest(&self) -> (&Reserve, Opened<'_>) {
        let poorest = self.lock_all().min_by_key(|(_, sealed)| sealed.size());
        poorest.expect("there is a node with memory")
    }

    fn lock_all(&self) -> impl Iterator<Item = (&Reserve, Opened<'_>)> {
        let locked: Vec<_> =
            self.reserves.iter().map(|reserve| (reserve, reserve.lock())).collect();
        locked.into_iter()
    }
}

/// Makes a reserve `left` bytes long. If only the lowering of its limit of blocks failed, the next
/// move lowers the limit.
pub(super) fn shorten(reserve: &mut Sealed, left: u64) -> Result<()> {
    match reserve.cut(left) {
        Err(error) if reserve.size() <= left => {
            log::warn!("a reserve may have free blocks until memory moves the next time: {error}");
            Ok(())
        }
        result => result,
    }
}

struct Preference;

impl Drop for Preference {
    fn drop(&mut self) {
        if let Err(error) = policy::set_for_thread(Policy::Default) {
            log::error!("a thread goes on preferring a NUMA node: {error}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_float_is_a_64th_of_the_pool_within_limits() {
        assert_eq!(float_of(0), LEAST_FLOAT);
        assert_eq!(float_of(16 << 20), LEAST_FLOAT);
        assert_eq!(float_of(1 << 30), 16 << 20);
        assert_eq!(float_of(64 << 30), PIECE);
    }

    #[test]
    fn a_machine_that_is_short_is_asked_for_a_folio() {
        let rows = [
            (PIECE + MARGIN, PIECE, PIECE),
            (PIECE + MARGIN - 1, PIECE, FOLIO_SIZE),
            (0, PIECE, FOLIO_SIZE),
            (u64::MAX, 3 * FOLIO_SIZE, 3 * FOLIO_SIZE),
            (0, 0, 0),
        ];
        for (available, float, piece) in rows {
            assert_eq!(
                longest_piece(available, float),
                piece,
                "{available} available, float of {float}"
            );
        }
    }

    #[test]
    fn what_is_short_beyond_the_float_makes_pages_missing() {
        let page = FOLIO_SIZE;
        let mut account = Account { total: 8, free: 8, ..Account::default() };
        for (short, missing) in
            [(0, 0), (LEAST_FLOAT, 0), (LEAST_FLOAT + 1, 1), (LEAST_FLOAT + 2 * page, 2)]
        {
            account.set_short(short, page);
            assert_eq!((account.short, account.missing), (short, missing));
        }
    }
}
