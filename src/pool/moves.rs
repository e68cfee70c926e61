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
//! folio. Pages of files and promised pages are never at stake.
//!
//! **Nodes.** Each NUMA node's part of the pool has a reserve and a float of its own. A piece moves
//! between a file and the reserve of the pages' home. The kernel is asked for memory of that node.
//! Where the node has none, the kernel takes memory of another node.
//!
//! **Short.** The bytes that a part lacks of its pages and its float are noted in its account
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

use super::plan::Transfer;
use super::{Account, Opened, Pool, Reserve, Source, Token};
use crate::error::{Error, Result};
use crate::sealed::Sealed;
use crate::steps::{self, Step};
use crate::sys::policy::prefer;
use crate::sys::{self, MARGIN, refuse_more_than_available};
use crate::units::{FOLIO_SIZE, Folio, NumaNode, PageSize, Range};
use std::sync::MutexGuard;

/// The most memory that moves between a file and the reserves at once. A piece of this size takes
/// some milliseconds; other callers wait for that long.
pub const PIECE: u64 = 32 << 20;

/// A change that takes no more than this needs no loan, as any system call can take as much for
/// itself.
const LITTLE: u64 = 64 << 10;

/// The float of a small pool.
const LEAST_FLOAT: u64 = 2 * FOLIO_SIZE;

/// Bytes of the float of a NUMA node's part of the pool whose pages have `bytes` bytes. A part
/// without pages has no float.
pub fn float_of(bytes: u64) -> u64 {
    if bytes == 0 {
        return 0;
    }
    (bytes / 64).next_multiple_of(FOLIO_SIZE).clamp(LEAST_FLOAT, PIECE)
}

/// Bytes of all the memory of a node's part of `pages` pages, with the float.
pub fn bytes_of(pages: u64, page_size: PageSize) -> u64 {
    let bytes = pages * page_size.bytes();
    bytes + float_of(bytes)
}

/// Bytes that may move at once, if the machine has `available` bytes and `float` bytes of the float
/// are there.
fn longest_piece(available: u64, float: u64) -> u64 {
    let most = if available < PIECE + MARGIN { FOLIO_SIZE } else { PIECE };
    most.min(float)
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
    /// Waits until no piece moves, and keeps other threads from moving one. This lock comes before
    /// those of the reserves.
    pub(super) fn moving(&self) -> Moving<'_> {
        self.moving.lock().expect("no panic while memory moves")
    }

    /// The part of `node` lacks `bytes` more.
    pub(super) fn note_short(&self, node: NumaNode, bytes: u64) {
        let mut accounts = self.accounts();
        let account = accounts.of_mut(node);
        account.set_short(account.short + bytes, self.page_size.bytes());
    }

    /// The part of `node` lacks up to `bytes` less, because the pool has taken them or needs them
    /// no more. Returns the part of `bytes` that it did lack.
    pub(super) fn lack_less(&self, node: NumaNode, bytes: u64) -> u64 {
        let mut accounts = self.accounts();
        let account = accounts.of_mut(node);
        let lacked = account.short.min(bytes);
        account.set_short(account.short - lacked, self.page_size.bytes());
        lacked
    }

    fn account_of(&self, node: NumaNode) -> Account {
        *self.accounts().of(node)
    }

    /// True if no piece can move on `node` before the pool takes some memory from the machine, or
    /// puts a free page at stake.
    fn is_float_used_up(&self, node: NumaNode) -> bool {
        self.account_of(node).float_at_hand() < FOLIO_SIZE
    }

    /// True if the next move may have to wait: for another move, for a reserve, or for memory that
    /// the pool lacks.
    pub fn move_must_wait(&self) -> bool {
        let waits = |reserve: &Reserve| {
            self.has_pages_of(reserve.node)
                && (reserve.is_locked() || self.is_float_used_up(reserve.node))
        };
        self.moving.try_lock().is_err() || self.reserves.iter().any(waits)
    }

    /// Takes the lacking bytes from the machine, as far as the machine can give them. Other moves
    /// go on between two steps.
    pub fn refill(&self) {
        for reserve in &self.reserves {
            while self.refill_step(reserve, &self.moving()) {}
        }
    }

    /// Takes a piece of the bytes that the part of a node lacks. Returns true if it lacked some and
    /// the machine had them.
    fn refill_step(&self, reserve: &Reserve, _moving: &Moving<'_>) -> bool {
        let short = self.account_of(reserve.node).short;
        let affordable = |step: &u64| *step > 0 && self.can_give(reserve.node, *step);
        let step = [short.min(PIECE), short.min(FOLIO_SIZE)].into_iter().find(affordable);
        step.is_some_and(|step| self.take_lacking(reserve, step))
    }

    /// True if the machine can give `bytes` now, of `node` if only that may give them.
    fn can_give(&self, node: NumaNode, bytes: u64) -> bool {
        let machine = refuse_more_than_available(bytes);
        machine.is_ok() && (self.source() == Source::Anywhere || self.has_room(node, bytes))
    }

    /// Takes `bytes` of the lacking bytes. Returns true if the machine had them. No piece moves
    /// meanwhile.
    fn take_lacking(&self, reserve: &Reserve, bytes: u64) -> bool {
        if let Err(error) = reserve.take(bytes, self.source()) {
            log::warn!("the pool lacks {bytes} bytes still: {error}");
            return false;
        }
        let surplus = bytes - self.lack_less(reserve.node, bytes); // it may have shrunk meanwhile
        self.give_surplus(reserve.node, surplus);
        self.announce_free_pages(); // pages that were missing
        true
    }

    /// Runs `work` with a loan of the float. `work` takes up to `bytes` of memory, a folio at most,
    /// and then frees as much. New memory comes from `node`, as far as that node has some.
    ///
    /// # Errors
    /// [`Error::NoMemory`] where nothing is left to lend; `work` has not run. The errors of `work`.
    pub(super) fn with_loan<T>(
        &self,
        node: NumaNode,
        bytes: u64,
        work: impl FnOnce() -> Result<T>,
    ) -> Result<T> {
        assert!(bytes <= FOLIO_SIZE, "a loan is a folio");
        if bytes <= LITTLE {
            let _preferred = prefer(node);
            return work();
        }
        let lender = self.lender(node);
        let _at_stake = self.lend(lender)?;
        let result = {
            let _preferred = prefer(node);
            work()
        };
        self.take_loan_back(lender);
        steps::reached(Step::LendTaken);
        result
    }

    /// The reserve that lends memory for `node`: its own if its float has a folio, or else the one
    /// with the largest float.
    fn lender(&self, node: NumaNode) -> &Reserve {
        let accounts = self.accounts();
        let float = |reserve: &&Reserve| {
            let float = accounts.of(reserve.node).float_at_hand();
            (reserve.node == node && float >= FOLIO_SIZE, float)
        };
        self.reserves.iter().max_by_key(float).expect("a pool has memory of some node")
    }

    /// A reserve gives a folio to the machine. Returns the page at stake, if there is one.
    fn lend(&self, reserve: &Reserve) -> Result<Option<Token<'_>>> {
        let Piece { _moving, _at_stake, .. } = self.begin_piece(reserve)?;
        give_piece(&mut reserve.lock(), FOLIO_SIZE)?;
        steps::reached(Step::LendGiven);
        self.note_short(reserve.node, FOLIO_SIZE);
        Ok(_at_stake)
    }

    /// Takes a folio back. If another process has taken the memory, the patrol takes a folio later.
    /// If the patrol has done so already, nothing is lacking.
    fn take_loan_back(&self, reserve: &Reserve) {
        let _moving = self.moving();
        let bytes = FOLIO_SIZE.min(self.account_of(reserve.node).short);
        if bytes > 0 {
            self.take_lacking(reserve, bytes);
        }
    }

    /// Begins to move a piece. If the node is short of memory, the piece is a folio.
    fn begin_piece(&self, reserve: &Reserve) -> Result<Piece<'_>> {
        let moving = self.moving();
        while self.is_float_used_up(reserve.node) && self.refill_step(reserve, &moving) {}
        let (most, at_stake) = self.stake(reserve, self.machine_has(reserve.node)?)?;
        Ok(Piece { _moving: moving, most, _at_stake: at_stake })
    }

    /// Makes sure that the loss of a piece on the node of `reserve` is the loss of its float, or of
    /// a free page where nothing of the float is left. Returns the most bytes of the piece if the
    /// machine has `available` bytes, and the page at stake.
    fn stake(&self, reserve: &Reserve, available: u64) -> Result<(u64, Option<Token<'_>>)> {
        match longest_piece(available, self.account_of(reserve.node).float_at_hand()) {
            0 => {
                let page = self.promise_on(reserve.node, 1).map_err(|_| Error::NoMemory)?;
                Ok((FOLIO_SIZE, Some(page)))
            }
            most => Ok((most, None)),
        }
    }

    /// Bytes that the machine can give, and can give of `node` where the machine has several nodes.
    /// A node that does not tell has as much as the machine.
    fn machine_has(&self, node: NumaNode) -> Result<u64> {
        let available = sys::memory_available()?;
        let of_node = || sys::numa::memory_available_on(node).unwrap_or(available);
        Ok(if self.is_alone { available } else { available.min(of_node()) })
    }

    /// Moves a piece of memory from the reserve of a node into `target`, for the start of the
    /// transfer: at most `most` bytes. `take` takes the memory. Returns the length of the piece.
    ///
    /// # Errors
    /// [`Error::NoMemory`] where nothing is left to put at stake, or where other processes have
    /// taken the memory that was given. No memory has moved, but `take` may have made `target`
    /// longer.
    pub(super) fn move_piece_out(
        &self,
        target: &mut Sealed,
        transfer: Transfer,
        most: u64,
        take: impl Fn(&mut Sealed, Range) -> Result<()>,
    ) -> Result<u64> {
        let Transfer { range, node } = transfer;
        let reserve = self.reserve_of(node);
        let begun = self.begin_piece(reserve)?;
        let mut source = reserve.lock();
        let _preferred = prefer(node);
        let piece = range.len().min(begun.most).min(source.size()).min(most);
        let mut exchange =
            |bytes| self.exchange(&mut source, target, Range::at(range.start, bytes), &take);
        match exchange(piece) {
            Err(Error::NoMemory) if piece > FOLIO_SIZE && !self.is_float_used_up(node) => {
                exchange(FOLIO_SIZE)
            }
            result => result,
        }
    }

    /// The reserve `source` gives memory, and `target` takes as much for `piece`. Returns the
    /// number of bytes.
    fn exchange(
        &self,
        source: &mut Opened<'_>,
        target: &mut Sealed,
        piece: Range,
        take: impl Fn(&mut Sealed, Range) -> Result<()>,
    ) -> Result<u64> {
        give_piece(source, piece.len())?;
        steps::reached(Step::MoveOutGiven);
        if let Err(error) = take(target, piece) {
            self.take_back(source, piece.len());
            return Err(error);
        }
        steps::reached(Step::MoveOutTaken);
        debug_assert!(piece.folios().all(|folio| target.has_memory(folio)), "{piece} has memory");
        Ok(piece.len())
    }

    /// Moves a piece of memory back into the reserve of `node`: the last part of `range` that has
    /// memory. `give` takes the memory out of `source`. Returns the part that moved, or `None`
    /// where `range` has no memory.
    ///
    /// # Errors
    /// [`Error::NoMemory`] where nothing is left to put at stake; nothing has moved. The errors of
    /// `give`.
    pub(super) fn move_piece_in(
        &self,
        source: &mut Sealed,
        Transfer { range, node }: Transfer,
        give: impl FnOnce(&mut Sealed, Range) -> Result<()>,
    ) -> Result<Option<Range>> {
        if !range.folios().any(|folio| source.has_memory(folio)) {
            return Ok(None);
        }
        let reserve = self.reserve_of(node);
        let begun = self.begin_piece(reserve)?;
        let Some(piece) = last_piece_within(source, range, begun.most) else {
            return Ok(None);
        };
        let mut target = reserve.lock();
        let given = give(source, piece);
        if given.is_err() && piece.folios().any(|folio| source.has_memory(folio)) {
            return given.map(|()| None);
        }
        steps::reached(Step::MoveInGiven);
        self.take_back(&mut target, piece.len());
        steps::reached(Step::MoveInTaken);
        debug_assert!(range.covers(piece), "{piece} is not in {range}");
        debug_assert!(!piece.folios().any(|folio| source.has_memory(folio)), "{piece} is given");
        given.map(|()| Some(piece))
    }

    /// Moves a piece of the memory of `sealed` from one node to another: the first part of `range`,
    /// which has memory. The reserve of `to` gives as much first, so that the node has room for
    /// whole folios. The reserve of `from` takes the memory that becomes free there.
    ///
    /// `counts` says which of the folios that have moved count as moved, and may add others: the
    /// reserve of `to` takes back what it gave for the rest. Returns the piece, and the folios that
    /// count.
    ///
    /// # Errors
    /// [`Error::NoMemory`] where nothing is left to put at stake. Nothing has moved.
    pub(super) fn exchange_piece(
        &self,
        sealed: &Sealed,
        range: Range,
        from: NumaNode,
        to: NumaNode,
        counts: impl FnOnce(Range, Vec<Folio>) -> Vec<Folio>,
    ) -> Result<(Range, Vec<Folio>)> {
        let (giver, taker) = (self.reserve_of(to), self.reserve_of(from));
        let begun = self.begin_piece(giver)?;
        let (most, _at_stake) = self.stake(taker, u64::MAX)?;
        let piece = Range::at(range.start, range.len().min(begun.most).min(most));
        give_piece(&mut giver.lock(), piece.len())?;
        steps::reached(Step::RelocateGiven);
        let moved = sealed.migrate(piece, to).unwrap_or_else(|error| {
            log::warn!("memory stays on node {from}: {error}");
            Vec::new()
        });
        steps::reached(Step::RelocateMoved);
        let moved = counts(piece, moved);
        let bytes = moved.len() as u64 * FOLIO_SIZE;
        assert!(bytes <= piece.len(), "no more moves than the piece");
        debug_assert!(moved.iter().all(|folio| piece.covers(folio.range())), "of {piece}");
        self.take_back(&mut taker.lock(), bytes);
        self.take_back(&mut giver.lock(), piece.len() - bytes);
        steps::reached(Step::RelocateTaken);
        Ok((piece, moved))
    }

    /// Moves the first part of `range`, which a program has moved to another node behind the
    /// account's back, to `home`: the node that the account has it on. The reserve of `home` hands
    /// over as much first, so that each folio finds a free piece and moves whole, and takes as much
    /// again. So neither the reserve nor the account changes. Returns the piece and the folios of
    /// it that lie on `home` then.
    pub(super) fn bring_piece_home(
        &self,
        sealed: &Sealed,
        range: Range,
        home: NumaNode,
    ) -> Result<(Range, Vec<Folio>)> {
        let reserve = self.reserve_of(home);
        let begun = self.begin_piece(reserve)?;
        let piece = Range::at(range.start, range.len().min(begun.most));
        give_piece(&mut reserve.lock(), piece.len())?;
        steps::reached(Step::RelocateGiven);
        let moved = sealed.migrate(piece, home);
        steps::reached(Step::RelocateMoved);
        self.take_back(&mut reserve.lock(), piece.len());
        steps::reached(Step::RelocateTaken);
        Ok((piece, moved?))
    }

    /// A reserve takes the memory that was given just now. If another process has taken it first,
    /// the pool is short of it.
    fn take_back(&self, reserve: &mut Opened<'_>, bytes: u64) {
        if bytes == 0 {
            return;
        }
        if let Err(error) = lengthen(reserve, bytes) {
            log::warn!(
                "another process has caught {bytes} bytes of the pool, which takes them again later: {error}"
            );
            self.note_short(reserve.node(), bytes);
        }
    }
}

/// The last run of folios with memory in `range`, at most `most` bytes long.
fn last_piece_within(source: &Sealed, range: Range, most: u64) -> Option<Range> {
    let mut folios = range.folios().rev().skip_while(|folio| !source.has_memory(*folio));
    let end = folios.next()?.range().end;
    let before = folios
        .take((most / FOLIO_SIZE) as usize - 1)
        .take_while(|folio| source.has_memory(*folio))
        .count() as u64;
    Some(Range::new(end - (before + 1) * FOLIO_SIZE, end))
}

/// A reserve gives `bytes` to the machine.
///
/// # Errors
/// [`Error::NoMemory`] if the reserve has less than that, as pages are missing, or for no bytes.
fn give_piece(reserve: &mut Sealed, bytes: u64) -> Result<()> {
    let left = reserve.size().checked_sub(bytes).filter(|_| bytes > 0).ok_or(Error::NoMemory)?;
    shorten(reserve, left)
}

fn lengthen(reserve: &mut Sealed, bytes: u64) -> Result<()> {
    let size = reserve.size();
    reserve.take(Range::at(size, bytes), size + bytes)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_float_is_a_64th_of_the_pool_within_limits() {
        assert_eq!(float_of(0), 0);
        assert_eq!(float_of(FOLIO_SIZE), LEAST_FLOAT);
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
}
